"""Seconds of a call, on a CPU or on a GPU."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
L2_BYTES = 256 * 2**20  # written between calls to empty a GPU's L2 cache; larger than any
MAX_CALLS = 1000  # in one measurement, however short the call
LONG = 5  # times the length of a measurement: a first call of so many is no short one that was still cold


class Clock:
    """Seconds of a call, averaged over `calls`: wall time on a CPU, the GPU's own events on a GPU.

    With `flush`, a GPU's L2 cache is emptied before each call (outside its time), so that inputs
    come from memory, as they do in a model.
    """

    def __init__(self, device: str, flush: bool = False) -> None:
        self.on_gpu = device == "cuda"
        self.scratch = (
            torch.empty(L2_BYTES, dtype=torch.int8, device=device) if flush and self.on_gpu else None
        )

    def __call__(self, call: Call, calls: int = 1) -> float:
        if self.on_gpu:
            return self._events(call, calls)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def _events(self, call: Call, calls: int) -> float:
        spans = []
        for _ in range(calls):
            if self.scratch is not None:
                self.scratch.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) * 1e-3 / calls

    def calls_for(self, call: Call, seconds: float) -> int:
        """How many calls take `seconds`; warms up on the way, a call that is far longer only once."""
        if self(call) > LONG * seconds:
            return 1
        self(call)
        once = min(self(call), self(call))
        return min(MAX_CALLS, max(1, math.ceil(seconds / max(once, 1e-9))))
