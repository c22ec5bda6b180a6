"""Run a sample of the op table in some dtype, and hold the result to the error rule.

The truth is the reference in float64 on the same rounded inputs.  An element may be wrong by

    2 · err_torch + c · u_acc · (1 + S) · max|any truth| + 2 · u_io · max|truth|

where err_torch is torch's own largest error on these inputs, u_acc = 2⁻²⁴, c = 8, u_io the rounding
unit of the dtype, S the conditioning of the op (`Op.condition`), and "any" all outputs, or all
gradients, of the sample: a gradient that cancels to 0 is a difference of terms as large as those.
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


class Outcome(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def run(op: Op, sample: Sample, function=None, backend: str | None = None, seed: int = 0) -> Outcome:
    """Outputs, and gradients for a random upstream gradient, of one sample.

    What an op writes to is copied before, and counts as outputs.
    """
    if not op.gradients:
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
    return Outcome([o.detach() for o in outputs], list(gradients))


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


def truth(op: Op, sample: Sample) -> Outcome:
    return run(op, sample.map(Tensor.double), backend="reference")


def yardstick(op: Op, sample: Sample) -> Outcome:
    """What torch makes of it; torch's own low-precision norms are too wrong to measure by."""
    low = op.family != "norm"
    return run(op, sample if low else sample.map(Tensor.float), function=op.eager)


def error(x: Tensor, exact: Tensor) -> float:
    """The largest difference; equal infinities and a NaN for a NaN do not differ."""
    x = x.double()
    same = (x == exact) | (x.isnan() & exact.isnan())
    return torch.where(same, 0.0, (x - exact).abs()).max().item() if x.numel() else 0.0


def violations(op: Op, sample: Sample, dtype: torch.dtype, got: Outcome) -> list[str]:
    """Which results break the rule, and by how much."""
    exact, torch_own = truth(op, sample), yardstick(op, sample)
    condition = op.condition(*sample.args, **sample.kwargs)
    bad = []
    for kind in ("outputs", "gradients"):
        results = list(zip(getattr(got, kind), getattr(exact, kind), getattr(torch_own, kind)))
        largest = [_largest(e) for _, e, _ in results]
        whole = max(largest, default=0.0)
        for i, (x, e, t) in enumerate(results):
            allowed = 2 * error(t.to(x.dtype), e)
            allowed += ACCUMULATION * (1 + condition) * whole + 2 * UNIT[dtype] * largest[i]
            wrong = error(x, e)
            if not wrong <= allowed:  # NaN is a violation, too
                bad.append(f"{sample.label}: {kind}[{i}] is wrong by {wrong:.3g}, allowed {allowed:.3g}")
    return bad


def _largest(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
