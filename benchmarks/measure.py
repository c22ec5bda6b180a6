"""Time and memory of a call: interleaved rounds, peak resident memory."""

import ctypes
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from llmkern.clock import Call, Clock
from llmkern.ops import empty_cache


class Settings(NamedTuple):
    """How carefully to measure.

    Attributes:
        rounds: how often each peer is measured, in turn.
        seconds: length of one measurement at least; short calls are repeated.
        budget: seconds after which a case stops early, once it has 3 rounds.
    """

    rounds: int = 9
    seconds: float = 0.02
    budget: float = 15.0


def interleave(clock: Clock, peers: dict[str, Call], settings: Settings) -> dict[str, list[float]]:
    """Seconds of one call of each peer, once for each round.

    All peers are measured in every round, in an order that turns, so that a machine that slows down
    slows them all down: compare within a round.
    """
    calls = {name: clock.calls_for(call, settings.seconds) for name, call in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    names = list(peers)
    start = time.perf_counter()
    for i in range(settings.rounds):
        if i >= 3 and time.perf_counter() - start > settings.budget:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(peers[name], calls[name]))
    return times


def iqr(values: list[float]) -> float:
    """Distance between the first and the third quartile; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return third - first


def ratio(times: list[float], ours: list[float]) -> float:
    """How many times faster `ours` is: the median of the ratios within each round."""
    return median(a / b for a, b in zip(times, ours))


def peak_bytes(call: Call, device: str) -> int | None:
    """Memory that a call needs on top of what exists before it, outputs included; None if unknown.

    On a GPU torch's allocator tells.  On Linux it is the rise of the process's peak resident memory,
    which sees scratch memory that C++ libraries get for themselves, but not what they keep from call
    to call; other systems do not tell.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    rises: list[int] = []
    for _ in range(3):
        rise = resident_rise(call)
        if rise:
            rises.append(rise)
        if len(rises) == 2 and max(rises) <= 1.01 * min(rises):
            break
    return min(rises, default=None)


def resident_rise(call: Call) -> int | None:
    """Bytes by which one call raises the peak memory of this process; None where the system does not tell."""
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that free() kept would be used again unseen
        empty_cache()  # and what llmkern keeps
        reset.write_text("5")  # sets the peak back to the present
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """Bytes of this process as Linux counts them: "VmRSS", or "VmHWM", the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
