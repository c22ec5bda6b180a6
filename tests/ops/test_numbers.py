"""Every op x backend x dtype x sample of the table: the numbers, against float64."""

import pytest
import torch
from error_rule import UNIT, flatten, run, truth, violations
from planted import breach
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from llmkern import ops
from llmkern.ops import OPS
from llmkern.ops.op import Op, differentiable, samples

pytestmark = pytest.mark.usefixtures("strict")
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
WITH_GRADIENTS = {name: op for name, op in OPS.items() if op.gradients}
each_differentiable_op = pytest.mark.parametrize("op", WITH_GRADIENTS.values(), ids=WITH_GRADIENTS)
each_dtype = pytest.mark.parametrize("dtype", UNIT, ids=lambda d: str(d).removeprefix("torch."))


@each_op
@each_dtype
def test_error_rule(op: Op, dtype: torch.dtype, backend: str, device: str):
    for sample in samples(op, dtype, device):
        bad = violations(op, sample, dtype, run(op, sample, backend=backend))
        assert not bad, "\n".join(bad)


@each_op
def test_the_rule_can_fail(op: Op):
    """A relative error of 1e-4 in float32 must not pass."""
    for sample in samples(op, torch.float32):
        got = run(op, sample, backend="reference")
        if not got.outputs[0].count_nonzero():
            continue
        got.outputs[0] += 1e-4 * got.outputs[0].abs().max()
        assert violations(op, sample, torch.float32, got), sample.label
        return


@each_op
def test_reference_is_torch_in_float64(op: Op):
    for sample in samples(op, torch.float64):
        ours, theirs = truth(op, sample), run(op, sample, function=op.eager)
        for a, b in zip((*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True, msg=sample.label)


@each_differentiable_op
def test_gradcheck(op: Op, silent):
    """The formulas of backward, and of double backward, against finite differences."""
    checked = 0
    for sample in samples(op, torch.float64):
        inputs = differentiable(op, sample)
        if sum(t.numel() for t in inputs) > 400 or not all(t.numel() for t in inputs):
            continue
        if sample.label in ("huge logits", "large", "relu", "reglu", "all masked"):
            continue  # finite differences cross a kink or drown in rounding
        leaves = [t.detach().requires_grad_() for t in inputs]
        swap = {id(t): leaf for t, leaf in zip(inputs, leaves)}

        def function(*values, sample=sample, swap=swap, leaves=leaves):
            now = dict(zip(map(id, leaves), values))
            return op.public(*_replaced(sample.args, swap, now), **dict(_items(sample.kwargs, swap, now)))

        torch.autograd.gradcheck(function, leaves, fast_mode=True)
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        checked += 1
    assert checked or op.name == "ffn"


def test_a_planted_gradient_is_seen(monkeypatch, silent):
    breach(monkeypatch, OPS["softmax"], lambda y, x: 1.1 * y - 0.1 * y.detach())
    with pytest.raises(GradcheckError):
        test_gradcheck(OPS["softmax"], None)


def _replaced(values, swap, now):
    return tuple(now[id(swap[id(v)])] if id(v) in swap else v for v in values)


def _items(kwargs, swap, now):
    return zip(kwargs, _replaced(kwargs.values(), swap, now))


@each_differentiable_op
def test_double_backward_on_the_fast_kernel(op: Op):
    """create_graph=True leaves the kernels and gives what float64 gives."""
    sample = next(iter(samples(op, torch.float32)))

    def second(sample, backend):
        sample = sample.map(lambda t: t.detach())
        inputs = [t.requires_grad_() for t in differentiable(op, sample)]
        with ops.use(backend):
            out = op.public(*sample.args, **sample.kwargs)
            out = (out[0] if isinstance(out, tuple) else out).square().sum()
            grads = torch.autograd.grad(out, inputs, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for got, exact in zip(second(sample, "cpp"), second(sample.map(Tensor.double), "reference")):
        torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-4 * exact.abs().max().item())


@each_op
def test_inputs_unchanged(op: Op, backend: str, device: str):
    for sample in samples(op, torch.float32, device):
        before = sample.map(lambda t: t.detach().clone())
        run(op, sample, backend=backend)
        for a, b in zip(*(flatten((s.args, s.kwargs)) for s in (sample, before))):
            assert torch.equal(a.detach(), b), sample.label


def test_a_planted_bit_of_an_input_is_seen(monkeypatch):
    def change(y: Tensor, x: Tensor) -> Tensor:
        x.detach().view(-1)[:1].mul_(1 + 2.0**-23)
        return y

    breach(monkeypatch, OPS["softmax"], change)
    with pytest.raises(AssertionError):
        test_inputs_unchanged(OPS["softmax"], "cpp", "cpu")


@each_op
def test_same_bits_for_any_thread_count(op: Op):
    threads = torch.get_num_threads()
    for sample in samples(op, torch.float32):
        runs = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            runs.append(run(op, sample, backend="cpp"))
        torch.set_num_threads(threads)
        for other in runs[1:]:
            for a, b in zip((*runs[0].outputs, *runs[0].gradients), (*other.outputs, *other.gradients)):
                assert torch.equal(a, b), sample.label
