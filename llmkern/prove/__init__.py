"""prove(model, batch): does the swapped model compute the same?  float64 is the judge."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..report import Report
from ..swap import restore_, swap_
from .compare import Row, compare, equal
from .judge import LossFn, Outcome, Subject
from .text import describe

LEARNING_RATE = 1e-3
STEP = 1e-5  # of the finite difference, times the size of the weights


@dataclass(frozen=True)
class Proof:
    """What was found; `print` shows it.

    Attributes:
        rows: errors of outputs, loss, gradients and a few losses, against float64.
        slope: relative distance of the gradient from a finite difference of the float64 loss.
        slope_allowed: how large it may be.
        determinism: for "3 runs" and "1, 2, 4 threads", whether (llmkern, torch) gave the same bits.
        restored: whether restore_ gave the original's bits.
        speedup: seconds of a forward and backward of torch over llmkern's.
        swapped: the report of `swap_`.
        seconds: that it took.
    """

    rows: list[Row]
    slope: float
    slope_allowed: float
    determinism: dict[str, tuple[bool, bool]]
    restored: bool
    speedup: float
    swapped: Report
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether everything is as it must be."""
        return not self.failures()

    def failures(self) -> list[str]:
        """What is not, one sentence each."""
        failed = [
            f"{row.name} is {row.ours:.1e} from float64, allowed are {row.allowed:.1e}"
            for row in self.rows if not row.passed
        ]  # fmt: skip
        if not self.slope <= self.slope_allowed:
            failed.append(f"the gradient is {self.slope:.1e} from a finite difference")
        if not next(iter(self.determinism.values()))[0]:
            failed.append("two runs gave different bits")
        if not self.restored:
            failed.append("restore_ did not give the original back")
        if not self.swapped.changed:
            failed.append("nothing was swapped: there is nothing to prove")
        return failed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("rows", "swapped")}
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        verdict = {"passed": self.passed, "failures": self.failures()}
        return {**verdict, "rows": rows, **fields, "swapped": self.swapped.to_dict()}

    def __str__(self) -> str:
        return describe(self)


def prove(
    model: nn.Module, batch: Any, loss_fn: LossFn | None = None, steps: int = 10, **options: Any
) -> Proof:
    """Train copies of the model, as it is, swapped, and in float64, and compare them.

    The model itself is not touched.  Dropout is off, since it differs from run to run.

    Args:
        model: in float32 or bfloat16, plain or swapped.
        batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        loss_fn: loss_fn(output, batch); None takes the loss in the output, or else a sum of the output's
            elements with random signs.
        steps: of AdamW on the batch, whose losses are compared.
        options: of `swap_`.

    Returns:
        A Proof.

    Raises:
        ValueError: the model returns nothing that could be compared.
    """
    start = time.perf_counter()
    plain = Subject(model, batch, loss_fn)
    restore_(plain.model)
    judge = Subject(plain.model, batch, loss_fn, float64=True)
    ours = Subject(plain.model, batch, loss_fn)
    report = swap_(ours.model, **options)
    first, reference, truth = ours.run(), plain.run(), judge.run()
    curves = tuple(each.curve(steps, LEARNING_RATE) for each in (ours, plain, judge))
    rows = compare(first, reference, truth, curves)
    determinism = {"3 runs": _repeat(ours, plain, first, reference), **_threads(ours, plain)}
    slope, allowed = _slope(judge, first, reference, truth)
    speedup = _speedup(ours, plain)
    restore_(ours.model)
    restored = equal(ours.run(), reference)
    seconds = time.perf_counter() - start
    return Proof(rows, slope, allowed, determinism, restored, speedup, report, seconds)


def _repeat(ours: Subject, plain: Subject, first: Outcome, reference: Outcome) -> tuple[bool, bool]:
    return tuple(
        all(equal(subject.run(), before) for _ in range(2))
        for subject, before in ((ours, first), (plain, reference))
    )


def _threads(ours: Subject, plain: Subject, numbers: tuple[int, ...] = (1, 2, 4)) -> dict:
    if next(ours.model.parameters()).device.type != "cpu":
        return {}
    runs: tuple[list[Outcome], list[Outcome]] = [], []
    for number in numbers:
        with _with_threads(number):
            for outcomes, subject in zip(runs, (ours, plain)):
                outcomes.append(subject.run())
    same = tuple(all(equal(o, outcomes[0]) for o in outcomes[1:]) for outcomes in runs)
    return {f"{', '.join(map(str, numbers))} threads": same}


@contextmanager
def _with_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _slope(judge: Subject, ours: Outcome, torch_: Outcome, truth: Outcome) -> tuple[float, float]:
    """The gradient along a direction in which every parameter takes part, against a central difference."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(judge.model.named_parameters())
    direction = {
        name: g / (g.norm() or 1.0) * (0.5 + torch.rand((), generator=generator, dtype=g.dtype)).to(g)
        for name, g in truth.grads.items()
    }
    size = max(p.abs().max().item() for p in parameters.values())
    h = STEP * max(size, 1e-3)
    losses = []
    for sign in (1, -2, 1):  # up, down, and back
        for name, d in direction.items():
            parameters[name].add_(d, alpha=sign * h)
        losses.append(judge.loss()[1].item())
    slope = (losses[0] - losses[1]) / (2 * h)
    found, theirs = (
        sum((o.grads[name].double() * d).sum().item() for name, d in direction.items())
        for o in (ours, torch_)
    )
    scale = abs(slope) or 1.0
    return abs(found - slope) / scale, 4 * abs(theirs - slope) / scale + 64 * _eps(ours)


def _eps(outcome: Outcome) -> float:
    return torch.finfo(outcome.loss.dtype).eps


def _speedup(ours: Subject, plain: Subject, rounds: int = 5) -> float:
    """Median seconds of both, in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for seconds, subject in zip(times, (ours, plain)):
            begin = time.perf_counter()
            subject.run()
            seconds.append(time.perf_counter() - begin)
    return statistics.median(times[1]) / statistics.median(times[0])
