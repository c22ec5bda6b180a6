"""Every case of every op, measured: one row for each peer."""

import gc
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import NamedTuple

import torch

from llmkern.ceilings import Bound, Ceilings, dtype_name
from llmkern.ops import OPS
from llmkern.ops.explain import Choice
from llmkern.ops.op import Make, Op, Sample

from . import peers
from .measure import Call, Clock, Settings, interleave, iqr, peak_bytes, ratio


class Case(NamedTuple):
    """What is measured: a sample of an op, and how much of the op runs ("fwd" or "fwd+bwd")."""

    op: Op
    sample: Sample
    dtype: torch.dtype
    half: str

    def __str__(self) -> str:
        return f"{self.op.name} {self.sample.label} {dtype_name(self.dtype)} {self.half}"


@dataclass
class Row:
    """One peer on one case; README.md explains each field.  A peer that failed has only `error`."""

    op: str
    sample: str
    dtype: str
    half: str
    peer: str
    backend: str
    reasons: list[str]
    median_s: float | None = None
    iqr_s: float | None = None
    rounds: int | None = None
    gflops: float | None = None
    gbps: float | None = None
    ceiling: float | None = None
    limit: str | None = None
    peak_bytes: int | None = None
    speedup: float | None = None
    error: str | None = None


def cases(
    names: list[str], device: str, dtypes: list[torch.dtype], halves: list[str], quick: bool
) -> Iterator[Case]:
    """The cases of these ops from the op table, one of each op and dtype in turn.

    So a run that is cut short has seen every op.  With `quick` only the first sample of each op.
    """

    def stream(op: Op, dtype: torch.dtype) -> Iterator[Case]:
        for sample in islice(op.benchmarks(Make(dtype, device)), 1 if quick else None):
            yield from (Case(op, sample, dtype, half) for half in halves if op.gradients or half == "fwd")

    streams = [stream(OPS[name], dtype) for name in names for dtype in dtypes]
    while streams:
        for s in list(streams):
            case = next(s, None)
            if case is None:
                streams.remove(s)
            else:
                yield case


def run_case(
    case: Case,
    device: str,
    names: list[str],
    clock: Clock,
    ceilings: Ceilings,
    settings: Settings,
    memory_of: Collection[str] | None = None,
) -> list[Row]:
    """Measure one case: a row for each peer, with the memory of those in `memory_of`, by default of all."""
    torch.compiler.reset()  # else the eighth shape of an op would silently run uncompiled
    gc.collect()
    bound, choices = peers.examine(case.op, case.sample, case.half, ceilings)
    rows = {name: _empty_row(case, name, choices) for name in names}
    ready: dict[str, Call] = {}
    for name, call in peers.calls(case.op, case.sample, case.half, names).items():
        try:
            call()
            ready[name] = call
        except Exception as error:  # whatever stops a peer stands in its row
            rows[name].error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    times = interleave(clock, ready, settings) if ready else {}
    for name, values in times.items():
        _fill(rows[name], values, times.get("llmkern"), bound)
        if memory_of is None or name in memory_of:
            rows[name].peak_bytes = peak_bytes(ready[name], device)
    return list(rows.values())


def _empty_row(case: Case, peer: str, choices: list[Choice]) -> Row:
    backend = {"eager": "torch", "compile": "inductor", "reference": "reference"}.get(peer)
    why = [] if backend else peers.reasons(choices)
    label, dtype = case.sample.label, dtype_name(case.dtype)
    return Row(case.op.name, label, dtype, case.half, peer, backend or peers.backend_name(choices), why)


def _fill(row: Row, times: list[float], ours: list[float] | None, bound: Bound) -> None:
    row.median_s, row.iqr_s, row.rounds = median(times), iqr(times), len(times)
    row.gflops, row.gbps = bound.flops / row.median_s / 1e9, bound.bytes / row.median_s / 1e9
    row.ceiling, row.limit = bound.seconds / row.median_s, bound.limit
    row.speedup = ratio(times, ours) if ours else None
