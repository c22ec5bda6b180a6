"""Measure a machine: its ceilings, and the parts of them that ops reach inside training steps.

Ops are measured where they will run, in steps of small GPTs and encoders as plain PyTorch and swapped: with
caches as the ops before left them, and with outputs in memory as the allocator gives it.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from .. import ceilings, machine
from ..models import GPT, GPTConfig
from ..optim import AdamW
from ..quantize import Int4WeightOnly, Int8WeightOnly, quantize_
from ..swap import swap_
from .decode import DecodeStep
from .profile import Points, Profile, load, points_of
from .run import time_steps, trace, warm_up
from .trace import LARGE, Call
from .workload import Workload

ROUNDS = 5
DTYPES = torch.float32, torch.bfloat16  # the second is what the first is told to try
ENCODER_WIDTH = 640  # wider ones would tell nothing new of their ops


class Probe(NamedTuple):
    """A small model and its batch."""

    width: int
    heads: int
    layers: int
    batch: int
    length: int
    vocabulary: int


PROBES = [
    Probe(96, 4, 2, 4, 48, 80),
    Probe(160, 5, 2, 8, 96, 400),
    Probe(320, 5, 1, 6, 192, 4000),
    Probe(640, 10, 1, 2, 384, 16000),
    Probe(1024, 16, 1, 1, 768, 32000),
]


class Encoder(nn.Module):
    """Embedding, encoder layers with dropout, head: the ops of torch's own layers."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(probe.vocabulary, probe.width)
        layer = nn.TransformerEncoderLayer(probe.width, probe.heads, 4 * probe.width, 0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, probe.layers, enable_nested_tensor=False)
        self.head = nn.Linear(probe.width, probe.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def profile(device: str, dtype: torch.dtype, again: bool = False, say=lambda text: None) -> Profile:
    """The profile of this machine for `dtype`: kept from before, or measured now, which takes a minute.

    Args:
        device: "cpu" or "cuda".
        dtype: of the step; others are added to the profile when they are asked for.
        again: measure even if it was kept.
        say: told what is being measured.
    """
    about = machine.describe(device)
    found = None if again else load(about, device)
    if found is None:
        say("measuring this machine's ceilings")
        found = Profile(about, device, measure_ceilings(device))
        found.fresh = fresh_seconds(device)
    for wanted in (*DTYPES, dtype):
        name = ceilings.dtype_name(wanted)
        if name not in found.ceilings.flops:
            found.ceilings.flops |= ceilings.measure_flops(device, [wanted])
        if name not in found.points:
            say(f"measuring what ops reach of them in {name}")
            calibrate(found, wanted)
            found.save()
    return found


def measure_ceilings(device: str) -> ceilings.Ceilings:
    """The best of two rounds, so that a busy moment does not lower them."""
    found, again = (ceilings.measure(device, list(DTYPES), 0.15, cold=device == "cuda") for _ in range(2))
    for rates, others in ((found.flops, again.flops), (found.bandwidth, again.bandwidth)):
        for key, ways in rates.items():
            ways.update({way: max(rate, others[key][way]) for way, rate in ways.items()})
    return found


def calibrate(profile: Profile, dtype: torch.dtype, probes: list[Probe] = PROBES) -> None:
    """Add the measured parts of the ceilings to `profile`."""
    workloads = [workload for probe in probes for workload in _workloads(probe, profile.device, dtype)]
    for workload in workloads:
        warm_up(workload)
    rounds = [[trace(workload) for workload in workloads] for _ in range(ROUNDS)]  # far apart in time
    found: dict[str, Points] = {ceilings.dtype_name(dtype): {}}
    beside = []
    for workload, tracers in zip(workloads, zip(*rounds)):
        calls = tracers[0].calls
        times = [[call.seconds for call in same] for same in zip(*(tracer.calls for tracer in tracers))]
        for call, seconds in zip(calls, times):
            call.seconds = median(seconds)
        _collect(calls, profile, found)
        whole = min(time_steps(workload, 5, 0.3))
        beside.append((whole - sum(map(min, times))) / len(calls))
    if not profile.launch:
        profile.launch = max(0.0, *beside[:2])  # of the smallest models, where it is most of the time
    for name, table in found.items():
        for op, points in table.items():
            profile.points.setdefault(name, {}).setdefault(op, []).extend(points)


def _collect(calls: list[Call], profile: Profile, found: dict[str, Points]) -> None:
    """Put what these calls reached into `found`, by dtype and op: one point for each size."""
    for dtype in {call.dtype for call in calls}:
        name = ceilings.dtype_name(dtype)
        for op, points in points_of([c for c in calls if c.dtype == dtype], profile).items():
            found.setdefault(name, {}).setdefault(op, []).extend(_thin(points))


def fresh_seconds(device: str) -> float:
    """Seconds for each byte of a large tensor that its first writer waits for the system."""
    if device != "cpu":
        return 0.0
    size = 4 * LARGE
    first, again = [], []
    for _ in range(5):
        start = time.perf_counter()
        t = torch.empty(size, dtype=torch.int8).zero_()
        middle = time.perf_counter()
        t.zero_()
        again.append(time.perf_counter() - middle)
        first.append(middle - start)
    return max(0.0, min(first) - min(again)) / size


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point for each size: the median over the calls of it."""
    sizes: dict[float, list[float]] = {}
    for least, part in points:
        sizes.setdefault(least, []).append(part)
    return [(least, median(parts)) for least, parts in sizes.items()]


def _workloads(probe: Probe, device: str, dtype: torch.dtype) -> Iterator[Workload]:
    """The step of a GPT and of an encoder, plain and swapped, with torch's optimizer and with llmkern's."""
    shape = probe.batch, probe.length
    tokens = torch.randint(probe.vocabulary, shape, device=device)
    shape = GPTConfig(probe.vocabulary, probe.length, probe.layers, probe.heads, probe.width)
    for swap in (False, True):
        models = [(GPT(shape, kernels=False), (tokens, tokens))]
        if probe.width <= ENCODER_WIDTH:
            models.append((Encoder(probe), tokens))
        for model, batch in models:
            model = model.to(device)
            if swap:
                swap_(model)
            workload = Workload(model, batch, dtype=dtype)
            if swap:
                workload.make_optimizer = lambda parameters: AdamW(parameters, lr=0.0)
            yield workload
    if probe.width <= ENCODER_WIDTH:
        yield from _decoding(probe, device, dtype)


def _decoding(probe: Probe, device: str, dtype: torch.dtype) -> Iterator[Workload]:
    """One new token for each sequence, with weights in full and in 8 and 4 bits."""
    shape = GPTConfig(probe.vocabulary, probe.length, probe.layers, probe.heads, probe.width)
    token = torch.randint(probe.vocabulary, (probe.batch, 1), device=device)
    for config in (None, Int8WeightOnly(), Int4WeightOnly(group_size=32)):
        model = GPT(shape).to(device)
        if config is not None:
            quantize_(model, config)
        yield Workload(DecodeStep(model, probe.batch, probe.length - 1), token, "inference", dtype=dtype)
