"""What every op owes to torch: schemas, meta tensors, compile, autocast, odd gradients, FLOP counts."""

import pytest
import torch
from error_rule import run, truth
from planted import breach
from torch import Tensor
from torch.testing._internal.optests import OpCheckError
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import llmkern
from llmkern import ops
from llmkern.ops import OPS
from llmkern.ops.explain import Listen
from llmkern.ops.op import Make, Op, Sample, cost, differentiable, samples

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
WITH_GRADIENTS = {name: op for name, op in OPS.items() if op.gradients}
each_differentiable_op = pytest.mark.parametrize("op", WITH_GRADIENTS.values(), ids=WITH_GRADIENTS)


def first(op: Op, dtype: torch.dtype = torch.float32):
    return next(iter(samples(op, dtype)))


def halves(op: Op, sample) -> dict[str, tuple]:
    """The arguments of both halves of `op` for a sample."""
    with Listen(op) as heard:
        run(op, sample)
    return {
        half: tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        for half, args in heard.args.items()
    }


@each_op
def test_the_record_is_complete(op: Op):
    needed = ["reference", "outputs", "flops", "public", "eager", "draw"]
    if op.gradients:
        needed += ["save", "replay", "reference_bwd", "outputs_bwd", "flops_bwd"]
    for name in needed:
        assert callable(getattr(op, name)), name
    assert op.family and op.source and op.formula() and op.public.__doc__
    assert len(list(op.samples(Make(torch.float32)))) >= 8
    assert len(list(op.benchmarks(Make(torch.float32)))) >= 2


@each_op
def test_opcheck(op: Op, silent):
    """Schema, fake tensors and autograd registration of both halves, by torch's own checker."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for sample in list(samples(op, torch.float32))[:4]:
        for half, args in halves(op, sample).items():
            torch.library.opcheck(getattr(op, half), args, test_utils=tests)


@each_op
def test_compile_equals_eager(op: Op, silent):
    sample = first(op)
    torch._dynamo.reset()
    compiled = torch.compile(op.public, fullgraph=True, backend="aot_eager")
    eager, traced = run(op, sample), run(op, sample, function=compiled)
    for a, b in zip((*eager.outputs, *eager.gradients), (*traced.outputs, *traced.gradients)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_planted_result_of_compiled_code_is_seen(monkeypatch, silent):
    op = OPS["softmax"]
    breach(monkeypatch, op, lambda y, x: y * (1 + 1e-4 * torch.compiler.is_compiling()))
    with pytest.raises(AssertionError, match="not close"):
        test_compile_equals_eager(op, None)


def test_a_planted_shape_of_a_fake_tensor_is_seen(monkeypatch, silent):
    op = OPS["softmax"]
    with torch.library._scoped_library("planted", "FRAGMENT") as library:
        library.define("fwd(Tensor x) -> Tensor")
        library.impl("fwd", lambda x: x.softmax(-1), "CPU")
        library.impl("fwd", lambda x: x.new_empty(x.shape[0] + 1, x.shape[1]), "Meta")
        monkeypatch.setattr(op, "fwd", torch.ops.planted.fwd.default)
        with pytest.raises(OpCheckError, match="Shapes"):
            test_opcheck(op, None)


@each_op
def test_meta(op: Op, silent):
    sample = first(op)
    real = run(op, sample)
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (sample.args, sample.kwargs))
    meta = run(op, Sample(sample.label, args, kwargs))
    for a, b in zip((*meta.outputs, *meta.gradients), (*real.outputs, *real.gradients)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_meta


@each_differentiable_op
def test_stride_0_gradient(op: Op, backend: str, device: str):
    """`.sum().backward()` hands a gradient whose elements share one address."""
    for sample in list(samples(op, torch.float32, device))[:6]:
        grads = []
        for expanded in (True, False):
            sample = sample.map(lambda t: t.detach())
            inputs = [t.requires_grad_() for t in differentiable(op, sample)]
            with ops.use(backend):
                out = op.public(*sample.args, **sample.kwargs)
                out = out[0] if isinstance(out, tuple) else out
                upstream = torch.ones((), device=device).expand(out.shape)
                upstream = upstream if expanded else upstream.contiguous()
                grads.append(torch.autograd.grad(out, inputs, upstream))
        for a, b in zip(*grads):
            assert torch.equal(a, b), sample.label


@each_differentiable_op
def test_gradients_of_some_inputs(op: Op, backend: str, device: str):
    """Each gradient alone equals the same gradient among all."""
    sample = first(op).map(lambda t: t.to(device).detach())
    sample = sample._replace(args=tuple(a.to(device) if isinstance(a, Tensor) else a for a in sample.args))
    inputs = differentiable(op, sample)
    with ops.use(backend):

        def gradients(wanted):
            for t in inputs:
                t.requires_grad_(any(t is w for w in wanted))
            out = op.public(*sample.args, **sample.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, wanted, torch.full_like(out, 0.7))

        together = gradients(inputs)
        for t, grad in zip(inputs, together):
            assert torch.equal(gradients([t])[0], grad)


@each_op
def test_flop_counter(op: Op, silent):
    sample = first(op)
    expected = sum(cost(op, half, *args).flops for half, args in halves(op, sample).items())
    with FlopCounterMode(display=False) as counter:
        run(op, sample)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6, abs=2)


@each_differentiable_op
def test_autocast(op: Op, silent):
    """Under autocast an op that lowers runs in bfloat16; the others leave float32 as it is."""
    sample = first(op)
    with torch.autocast("cpu", torch.bfloat16):
        out = op.public(*sample.args, **sample.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    assert out.dtype == (torch.bfloat16 if op.lowers else torch.float32)
    got, exact = run(op, sample, function=torch.autocast("cpu", torch.bfloat16)(op.public)), truth(op, sample)
    for a, b in zip(got.gradients, exact.gradients):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_fallback_says_why():
    q = torch.randn(1, 1, 4, 300)
    llmkern.set_fallback("warn")
    with pytest.warns(llmkern.ops.FallbackWarning, match="the head dim is 300"):
        ops.attention(q, q, q)
    llmkern.set_fallback("error")
    with pytest.raises(llmkern.ops.FallbackError, match="1 to 256"):
        ops.attention(q, q, q)
    llmkern.set_fallback("warn")
    assert "head dim is 300" in str(llmkern.explain("attention", q, q, q))
