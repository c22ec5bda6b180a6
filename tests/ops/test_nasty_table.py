"""Nasty inputs for every op of the table: a result that is stated here, or an error of one sentence.

test_contract.py has more of them for every op: meta, compile, autocast, expanded gradients, gradients of some
inputs; test_nasty.py and the tests of each op have what only some can meet: masks, targets, positions.
"""

import inspect

import pytest
import torch
from error_rule import Outcome, run, truth
from torch import Tensor

from llmkern.ops import OPS
from llmkern.ops.op import Op, Sample, differentiable, samples

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
each_differentiable_op = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.gradients], ids=[name for name, op in OPS.items() if op.gradients]
)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def spread(t: Tensor) -> Tensor:
    """Every second element of a row."""
    return torch.stack((t, t), -1)[..., 0] if t.dim() else t


def moved(t: Tensor) -> Tensor:
    """Starts three elements into its storage, so that no vector is aligned."""
    return torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """All rows share memory."""
    return t[:1].expand(t.shape) if t.dim() and t.numel() else t


STRIDES = {"transposed": transposed, "spread": spread, "moved": moved, "expanded": expanded}
WRITTEN = {  # what an op writes to must lie in memory as it says
    ("adamw", "spread"): "has strides, expected contiguous tensors",
    ("adamw", "expanded"): "has strides, expected contiguous tensors",
    ("rope_inplace", "expanded"): "query is expanded",
    ("decode_attention", "expanded"): "k_cache is expanded",
}


@pytest.mark.parametrize("strides", STRIDES)
@each_op
def test_strides_change_nothing(op: Op, strides: str, silent):
    sample = next(samples(op, torch.float32))
    odd = _laid_out(sample, STRIDES[strides])
    if words := WRITTEN.get((op.name, strides)):
        with pytest.raises(ValueError, match=words):
            op.public(*odd.args, **odd.kwargs)
        return
    expected = _run(op, odd.map(lambda t: t.clone(memory_format=torch.contiguous_format)))
    got = _run(op, odd)
    for a, b in zip((*got.outputs, *got.gradients), (*expected.outputs, *expected.gradients)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def _laid_out(sample: Sample, layout) -> Sample:
    return sample.map(lambda t: layout(t.detach()))


def _run(op: Op, sample: Sample) -> Outcome:
    """As `run`, which copies what is written to: that takes the strides away."""
    if not op.mutates:
        return run(op, sample)
    with torch.no_grad():
        op.public(*sample.args, **sample.kwargs)
    bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
    found = [bound.get(name) for name in op.mutates]
    return Outcome([t for f in found for t in (f if isinstance(f, list) else [f]) if t is not None], [])


def put(value: float):
    """The first floating-point argument with one element set."""

    def change(op: Op, sample: Sample) -> Sample:
        done = []

        def once(t: Tensor) -> Tensor:
            t = t.detach().clone()
            if not done and t.numel():
                done.append(t)
                t[(-1,) * t.dim()] = value
            return t

        return sample.map(once)

    return change


VALUES = {
    "NaN": put(float("nan")),
    "inf": put(float("inf")),
    "-inf": put(float("-inf")),
    "subnormal": lambda op, sample: sample.map(lambda t: t * 1e-40),
    "zero": lambda op, sample: sample.map(torch.zeros_like),
}


SPREADS = ("attention", "decode_attention")  # an infinite score makes NaN of all that its head gives


@pytest.mark.parametrize("value", VALUES)
@each_op
def test_values_as_the_reference(op: Op, value: str, silent):
    """NaN and infinities are where the formulas in float64 have them, and nowhere else."""
    sample = VALUES[value](op, next(samples(op, torch.float32)))
    got, exact = run(op, sample), truth(op, sample)
    for a, b in zip((*got.outputs, *got.gradients), (*exact.outputs, *exact.gradients)):
        a = a.double()
        if "inf" in value and op.name in SPREADS:
            assert (b.isfinite() | ~a.isfinite()).all()
            a, b = a[:-1], b[:-1]  # the last sequence has it
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        lost = 1e-37 if value == "subnormal" else 0.0  # float32 has no more digits there
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * size + lost, equal_nan=True)


@pytest.mark.parametrize("value", [1e38, -1e38])
@each_op
def test_largest_values(op: Op, value: float, silent):
    """Results may be infinite or NaN, but they come."""
    sample = next(samples(op, torch.float32)).map(lambda t: torch.where(t > 0, value, -value / 2))
    assert run(op, sample).outputs


@each_differentiable_op
def test_without_gradients_the_same(op: Op, silent):
    sample = next(samples(op, torch.float32))
    with torch.no_grad():
        plain = op.public(*sample.args, **sample.kwargs)
    for a, b in zip(plain if isinstance(plain, tuple) else (plain,), run(op, sample).outputs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_op
def test_mixed_dtypes(op: Op, silent):
    """One argument in bfloat16 among float32: a result, or one sentence that names it."""
    sample = next(samples(op, torch.float32))
    bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
    for name, value in bound.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        try:
            out = op.public(**bound | {name: value.bfloat16()})
        except ValueError as error:
            assert "expected" in str(error) and "\n" not in str(error) and len(str(error)) < 200
        else:
            assert all(t.isfinite().all() for t in (out if isinstance(out, tuple) else (out,)))


@each_differentiable_op
def test_forward_mode(op: Op, silent):
    """⟨u, J t⟩ = ⟨Jᵀ u, t⟩ with J t by torch.func.jvp; the formulas run, as `explain` says once."""
    sample = next(samples(op, torch.float32)).map(Tensor.detach)
    x = differentiable(op, sample)[0]

    def function(x_new: Tensor) -> Tensor:
        args = [x_new if a is x else a for a in sample.args]
        out = op.public(*args, **{k: x_new if v is x else v for k, v in sample.kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    tangent = torch.ones_like(x) / 7
    out, change = torch.func.jvp(function, (x,), (tangent,))
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (grad,) = torch.autograd.grad(function(x.requires_grad_()), x, upstream)
    forward, backward = (change * upstream).sum(), (grad * tangent).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4)


@each_differentiable_op
def test_vmap(op: Op, silent):
    """Of one argument: as one call after the other."""
    sample = next(samples(op, torch.float32)).map(Tensor.detach)
    x = differentiable(op, sample)[0]

    def function(x_new: Tensor) -> Tensor:
        args = [x_new if a is x else a for a in sample.args]
        out = op.public(*args, **{k: x_new if v is x else v for k, v in sample.kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    many = torch.stack((x, 0.5 * x))
    one_by_one = torch.stack([function(each) for each in many])
    torch.testing.assert_close(torch.func.vmap(function)(many), one_by_one, rtol=1e-5, atol=1e-5)
