"""Random calls of every op on the kernels, held to the error rule, and their errors pooled.

A case is a number: `op.draw(Make(dtype, seed=number))` has the shapes, strides, offsets, options and
scales of that case, in float32, bfloat16 and float16 by turns.
"""

import math
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from error_rule import UNIT, Outcome, run, truth, violations, yardstick
from guard_pages import guarded
from torch import Tensor
from triton_interpreter import overflow_checks

import llmkern
from llmkern.ops import OPS
from llmkern.ops.op import Make, Op, Sample

DTYPES = list(UNIT)
CANCELS = 4.0
POOLED_FORWARD, POOLED_BACKWARD, POOLED_BIAS = 1.10, 1.25, 0.05


@dataclass
class Pool:
    """Sums over cases of errors in units of the last place, relative to the size of their tensor.

    A case in which torch or we are wrong by more than `CANCELS` units is one whose result cancels: it
    is held to the error rule, and counted here, but would drown the others in a sum of squares.
    """

    cases: int = 0
    cancelling: int = 0
    ours: float = 0.0  # Σ of mean error²
    torch: float = 0.0
    signed: float = 0.0  # Σ of mean error
    signed_torch: float = 0.0

    def add(self, got: Tensor, theirs: Tensor, exact: Tensor, unit: float) -> None:
        if not exact.is_floating_point() or not exact.numel():  # codes of a quantised cache
            return
        scale = unit * exact.square().mean().sqrt().item()
        if not math.isfinite(scale) or not scale:
            return
        ours, others = ((t.double() - exact) / scale for t in (got, theirs.to(got.dtype)))
        squares = ours.square().mean().item(), others.square().mean().item()
        if not all(square <= CANCELS**2 for square in squares):  # torch's is NaN at times
            self.cancelling += 1
            return
        self.cases += 1
        self.ours += squares[0]
        self.torch += squares[1]
        self.signed += ours.mean().item()
        self.signed_torch += others.mean().item()

    def join(self, other: "Pool") -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def ratio(self) -> float:
        """RMS error relative to torch's; 1 where both are exact."""
        if not self.torch:
            return math.inf if self.ours else 1.0
        return math.sqrt(self.ours / self.torch)

    @property
    def bias(self) -> float:
        """Mean signed error, in units of the last place."""
        return self.signed / max(1, self.cases)


@dataclass
class Tally:
    """What came of a number of cases of one op."""

    op: str
    forward: int = 0
    backward: int = 0
    bad: list[str] = field(default_factory=list)
    pools: dict[tuple[str, str], Pool] = field(default_factory=lambda: defaultdict(Pool))

    def join(self, other: "Tally") -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.bad += other.bad
        for key, pool in other.pools.items():
            self.pools[key].join(pool)


def draw(op: Op, seed: int) -> tuple[Sample, torch.dtype]:
    dtype = DTYPES[seed % len(DTYPES)]
    return op.draw(Make(dtype, seed=seed)), dtype


def fuzz(
    op: Op, seeds: Iterable[int], backend: str = "cpp", fenced: bool = False, with_gradient: int = 2**62
) -> Tally:
    """Run cases of `op`.

    Args:
        op: of the table.
        seeds: the cases.
        with_gradient: cases from this number on run forward alone.
        backend: where they run.
        fenced: inputs end at an unmapped page and have NaN between their elements, and in Triton's
            interpreter an int32 that overflows raises.
    """
    tally = Tally(op.name)
    for seed in seeds:
        sample, dtype = draw(op, seed)
        backward = seed < with_gradient
        with overflow_checks() if fenced else nullcontext():
            got = run(op, fence(sample) if fenced else sample, backend=backend, backward=backward)
        known = truth(op, sample, backward), yardstick(op, sample, backward)
        bad = violations(op, sample, dtype, got, known)
        tally.bad += [f"{op.name} case {seed}: {what}" for what in bad]
        tally.forward += 1
        tally.backward += bool(got.gradients)
        _pool(tally, dtype, got, *known)
    return tally


def fence(sample: Sample) -> Sample:
    """Each tensor in storage that ends at an unmapped page, with NaN between its elements."""
    return sample.map(_fenced)


def _fenced(x: Tensor) -> Tensor:
    if 0 in x.shape or 0 in x.stride():  # nothing to read, or elements that share an address
        return x
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    storage = guarded(torch.full((size,), math.nan, dtype=x.dtype))
    return storage.as_strided(x.shape, x.stride()).copy_(x)


def _pool(tally: Tally, dtype: torch.dtype, got: Outcome, exact: Outcome, theirs: Outcome) -> None:
    for kind in ("outputs", "gradients"):
        pool = tally.pools[str(dtype).removeprefix("torch."), kind]
        for results in zip(*(getattr(outcome, kind) for outcome in (got, theirs, exact))):
            pool.add(*results, UNIT[dtype])


def fuzz_all(
    cases: int, with_gradient: int, backend: str = "cpp", fenced: bool = False, processes: int = 2
) -> dict[str, Tally]:
    """`cases` of every op, the first `with_gradient` backward too, shared out over processes."""
    chunk = max(1, cases // 8)
    jobs = [
        (name, range(start, min(cases, start + chunk)), backend, fenced, with_gradient)
        for name in OPS
        for start in range(0, cases, chunk)
    ]
    tallies = {name: Tally(name) for name in OPS}
    with multiprocessing.get_context("fork").Pool(processes, initializer=_start) as pool:
        for tally in pool.imap_unordered(_job, jobs):
            tallies[tally.op].join(tally)
    return tallies


def _start() -> None:
    torch.set_num_threads(1)
    llmkern.set_fallback("silent")


def _job(job: tuple) -> Tally:
    name, *rest = job
    return fuzz(OPS[name], *rest)


def planted(op: Op, seed: int = 0) -> list[str]:
    """What the rule says of a kernel that is wrong by a thousandth of its largest output."""
    sample, dtype = draw(op, 3 * seed)  # float32
    got = run(op, sample, backend="reference")
    got.outputs[0] += 1e-3 * got.outputs[0].abs().max()
    return violations(op, sample, dtype, got)
