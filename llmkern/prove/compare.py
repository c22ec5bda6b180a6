"""The rules: how far from float64 a result may be, given how far torch's is.

Relative errors are ‖x - x₆₄‖ / ‖x₆₄‖ of whole tensors.  Case by case, "at most twice torch's error" raises
false alarms where torch was lucky; so torch's error is taken as no less than that of all tensors together.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .judge import Outcome

ROUNDINGS = 4  # of the result that are allowed on top
TIMES = 2.0  # torch's error


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        name: what it is.
        ours, torch: relative error against float64.
        allowed: how large `ours` may be.
    """

    name: str
    ours: float
    torch: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.ours <= self.allowed  # False for NaN


def error(x: Tensor, judge: Tensor, scale: float | None = None) -> float:
    """‖x - judge‖ / ‖judge‖, or over `scale`."""
    scale = judge.double().norm().item() if scale is None else scale
    distance = (x.double() - judge.double()).norm().item()
    return distance / scale if scale else distance


def compare(ours: Outcome, torch_: Outcome, judge: Outcome, curves: tuple[list[float], ...]) -> list[Row]:
    """Outputs, loss, gradients and the losses of a few steps."""
    u = torch.finfo(_dtype(ours)).eps / 2
    names = [n for n in judge.outputs if n in ours.outputs and n in torch_.outputs]
    rows = _tensors({f"output {n}": tuple(o.outputs[n] for o in (ours, torch_, judge)) for n in names}, u)
    usual = max([row.torch for row in rows], default=0.0)
    errors = [error(o.loss, judge.loss) for o in (ours, torch_)]
    rows.append(Row("loss", *errors, TIMES * max(errors[1], usual) + ROUNDINGS * u))
    gradients = {f"gradient of {n}": (ours.grads[n], torch_.grads[n], g) for n, g in judge.grads.items()}
    rows += _tensors(gradients, u)
    rows.append(_curve(*curves, u))
    return rows


def _tensors(tensors: dict[str, tuple[Tensor, Tensor, Tensor]], u: float) -> list[Row]:
    """A row for each; a gradient that cancels to nearly 0 is measured against the others."""
    norms = {name: t[2].double().norm().item() for name, t in tensors.items()}
    least = 1e-3 * max(norms.values(), default=0.0)
    both = {
        name: [error(x, t[2], max(norms[name], least) or 1.0) for x in t[:2]] for name, t in tensors.items()
    }
    pooled = math.sqrt(sum(e[1] ** 2 for e in both.values()) / max(1, len(both)))
    return [
        Row(name, ours, torch_, TIMES * max(torch_, pooled) + ROUNDINGS * u)
        for name, (ours, torch_) in both.items()
    ]


def _curve(ours: list[float], torch_: list[float], judge: list[float], u: float) -> Row:
    """The largest distance of a loss on the way; steps of an optimizer amplify roundings."""
    errors = [max(abs(a - b) / abs(b) if b else abs(a) for a, b in zip(c, judge)) for c in (ours, torch_)]
    return Row(f"losses of {len(judge) - 1} steps", *errors, 4 * errors[1] + max(1e-4, 64 * u))


def _dtype(outcome: Outcome) -> torch.dtype:
    return next(iter(outcome.grads.values())).dtype if outcome.grads else outcome.loss.dtype


def equal(a: Outcome, b: Outcome) -> bool:
    """Bit for bit."""
    same = torch.equal(a.loss, b.loss)
    for x, y in ((a.outputs, b.outputs), (a.grads, b.grads)):
        same = same and x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
    return same
