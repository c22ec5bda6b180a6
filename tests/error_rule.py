"""Run a sample of the op table in some dtype, and hold the result to the error rule.

The truth is the reference in float64 on the same rounded inputs.  An element may be wrong by

    2 · err_torch + c · u_acc · (1 + S) · max(V, G) + 2 · u_io · V

where err_torch is the largest error of torch in the same dtype: of its own op, and where that is not
enough, because torch is lucky at times, of its own op and of the reference's formulas on these inputs and
on 8 nearby, whose elements differ by one rounding unit.  u_acc = 2⁻²⁴, c = 8, u_io the rounding unit of
the dtype, S the conditioning of the op (`Op.condition`), V the largest magnitude among all outputs, or
all gradients, of the sample, and for gradients G the largest upstream one: a gradient that cancels to 0
is a difference of terms as large as those.
"""

import inspect
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from llmkern import ops
from llmkern.ops.op import Op, Sample, differentiable

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ACCUMULATION = 8 * 2.0**-24
NEARBY = 8  # inputs on which torch's error is looked at, too


class Outcome(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    upstream: float = 0.0  # the largest magnitude of the gradients that came in


def run(
    op: Op, sample: Sample, function=None, backend: str | None = None, seed: int = 0, backward: bool = True
) -> Outcome:
    """Outputs, and with `backward` gradients for a random upstream gradient, of one sample.

    What an op writes to is copied before, and counts as outputs.
    """
    if not (op.gradients and backward):
        return Outcome(_forward(op, sample, function or op.public, backend), [])
    sample = sample.map(lambda t: t.detach())
    wanted = [t for t in differentiable(op, sample) if t is not sample.kwargs.get("attn_mask")]
    for t in wanted:
        t.requires_grad_()
    function = function or op.public
    with ops.use(backend) if backend else nullcontext():
        outputs = function(*sample.args, **sample.kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
    return Outcome([o.detach() for o in outputs], list(gradients), max(map(_largest, upstream)))


def _forward(op: Op, sample: Sample, function, backend: str | None) -> list[Tensor]:
    if op.mutates:
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (sample.args, sample.kwargs))
        sample = Sample(sample.label, args, kwargs)
    with torch.no_grad(), ops.use(backend) if backend else nullcontext():
        outputs = function(*sample.args, **sample.kwargs)
    return [*flatten(outputs), *written(op, sample)]


def written(op: Op, sample: Sample) -> list[Tensor]:
    """The tensors among a sample's arguments that the op writes to."""
    bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
    return [t for name in op.mutates for t in flatten(bound.get(name))]


def flatten(value) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def truth(op: Op, sample: Sample, backward: bool = True) -> Outcome:
    return run(op, sample.map(Tensor.double), backend="reference", backward=backward)


def yardstick(op: Op, sample: Sample, backward: bool = True) -> Outcome:
    """What torch makes of it; torch's own low-precision norms are too wrong to measure by."""
    sample = _norm_in_float32(sample) if op.family == "norm" else sample
    return run(op, sample, function=op.eager, backward=backward)


def _nearby(sample: Sample, seed: int) -> Sample:
    """The sample with each element moved by one rounding unit of its dtype, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(t: Tensor) -> Tensor:
        sign = torch.randint(2, t.shape, generator=generator).to(t.device) * 2 - 1
        return (t.double() * (1 + sign * 2 * UNIT.get(t.dtype, 0.0))).to(t.dtype)

    return sample.map(move)


def _norm_in_float32(sample: Sample) -> Sample:
    """The sum with a residual is rounded before it is normalised, as in a model of separate modules."""
    sample = sample.map(Tensor.detach)
    residual = sample.kwargs.get("residual")
    if residual is not None:
        rounded = sample.args[0] + residual
        kwargs = sample.kwargs | {"residual": torch.zeros_like(rounded)}
        sample = sample._replace(args=(rounded, *sample.args[1:]), kwargs=kwargs)
    return sample.map(Tensor.float)


def error(x: Tensor, exact: Tensor) -> float:
    """The largest difference; equal infinities and a NaN for a NaN do not differ."""
    x = x.double()
    same = (x == exact) | (x.isnan() & exact.isnan())
    return torch.where(same, 0.0, (x - exact).abs()).max().item() if x.numel() else 0.0


def violations(
    op: Op, sample: Sample, dtype: torch.dtype, got: Outcome, known: tuple[Outcome, Outcome] | None = None
) -> list[str]:
    """Which results break the rule, and by how much; `known`: truth and yardstick, where they are."""
    backward = bool(got.gradients)
    exact, theirs = known or (truth(op, sample, backward), yardstick(op, sample, backward))
    by_torch = _errors(theirs, exact, got)
    bad = _beyond(op, sample, dtype, got, exact, by_torch)
    for seed in range(NEARBY + 1) if bad else ():
        near = _nearby(sample, seed) if seed else sample
        exact_near = truth(op, near, backward)
        for other in (yardstick(op, near, backward), run(op, near, backend="reference", backward=backward)):
            by_torch = [max(pair) for pair in zip(by_torch, _errors(other, exact_near, got))]
    return bad and _beyond(op, sample, dtype, got, exact, by_torch)


def _errors(by_torch: Outcome, exact: Outcome, got: Outcome) -> list[float]:
    """The error of each output and gradient, rounded to the dtype of ours; 0 where torch gives NaN."""
    found = zip(*((*outcome.outputs, *outcome.gradients) for outcome in (by_torch, exact, got)))
    errors = [error(t.to(x.dtype), e) for t, e, x in found]
    return [e if e == e else 0.0 for e in errors]


def _beyond(
    op: Op, sample: Sample, dtype: torch.dtype, got: Outcome, exact: Outcome, by_torch: list[float]
) -> list[str]:
    """The results that are wrong by more than the rule allows for these errors of torch."""
    condition = op.condition(*sample.args, **sample.kwargs)
    bad, by_torch = [], iter(by_torch)
    for kind in ("outputs", "gradients"):
        results = list(zip(getattr(got, kind), getattr(exact, kind)))
        largest = max((_largest(e) for _, e in results), default=0.0)
        terms = max(largest, exact.upstream) if kind == "gradients" else largest
        for i, (x, e) in enumerate(results):
            allowed = ACCUMULATION * (1 + condition) * terms + 2 * UNIT[dtype] * largest
            allowed += 2 * next(by_torch)
            wrong = error(x, e)
            if not wrong <= allowed:  # NaN is a violation, too
                bad.append(f"{sample.label}: {kind}[{i}] is wrong by {wrong:.3g}, allowed {allowed:.3g}")
    return bad


def _largest(exact: Tensor) -> float:
    if exact.is_meta:
        return 0.0
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
