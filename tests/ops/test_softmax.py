"""softmax and log_softmax: -inf, NaN, huge values, dtypes, modules, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded
from torch import nn

from llmkern import ops
from llmkern.nn import LogSoftmax, Softmax

INF = math.inf
both = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@both
@pytest.mark.parametrize("width", [5, 2500, 9000])  # one step, several of the C++ kernel, several blocks
def test_values_that_are_not_numbers(name: str, width: int, backend: str, device: str, strict):
    x = randn(6, width).to(device)
    x[0] = -INF
    x[1, 1:] = -INF
    x[2, : width - 1] = -INF
    x[3, 2] = INF
    x[4, width - 1] = math.nan
    with ops.use(backend):
        ours = getattr(ops, name)(x)
    torch.testing.assert_close(ours, getattr(F, name)(x, -1), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert ours.isnan().all(1).tolist() == [True, False, False, True, True, False]


@both
def test_gradient_where_masked(name: str, backend: str, device: str, strict):
    x, dy = randn(3, 40).to(device), randn(3, 40).to(device)
    x[:, ::3] = -INF
    x.requires_grad_()
    with ops.use(backend):
        (ours,) = torch.autograd.grad(getattr(ops, name)(x), x, dy)
    (theirs,) = torch.autograd.grad(getattr(F, name)(x, -1), x, dy)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_sum_to_one(backend: str, device: str, strict):
    with ops.use(backend):
        total = ops.softmax(randn(3, 9000).to(device) * 5).double().sum(-1)
    assert (total - 1).abs().max() < 3e-6


@both
def test_rows_far_below_zero(name: str, backend: str, device: str, strict):
    """No 0 beside a row counts among its values, and a maximum that comes late does."""
    for width in (3, 37, 9001):
        x = (randn(2, width).to(device) * 3).round() / 8  # float32 holds x - 4096 exactly
        x[:, -1] = 3.0
        with ops.use(backend):
            far_below, at_zero = (getattr(ops, name)(t) for t in (x - 4096, x))
        torch.testing.assert_close(far_below, at_zero, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(at_zero, getattr(F, name)(x, -1), rtol=1e-5, atol=1e-9)


@both
def test_dtype(name: str, backend: str, device: str, strict):
    x = randn(3, 40, dtype=torch.bfloat16).to(device)
    with ops.use(backend):
        assert torch.equal(getattr(ops, name)(x, dtype=torch.float32), getattr(ops, name)(x.float()))
        with torch.autocast(device, torch.bfloat16):
            assert getattr(ops, name)(x).dtype == torch.float32
        assert getattr(ops, name)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_read_or_write_outside(backend: str, device: str, dtype: torch.dtype, side: str, strict):
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    with ops.use(backend):
        for function in (ops.softmax, ops.log_softmax):
            function(guarded(randn(3, 37, dtype=dtype), side).requires_grad_()).sum().backward()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_modules(dim: int, strict):
    x = randn(2, 3, 4)
    for ours, theirs in ((Softmax, nn.Softmax), (LogSoftmax, nn.LogSoftmax)):
        torch.testing.assert_close(ours(dim)(x), theirs(dim)(x))


def test_double_backward_where_masked(silent):
    x = randn(2, 6).double()
    x[:, 1] = -INF
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.softmax(x).square().sum(), x, create_graph=True)
    (exact,) = torch.autograd.grad(F.softmax(x, -1).square().sum(), x, create_graph=True)
    ours, theirs = (torch.autograd.grad(g.square().sum(), x)[0] for g in (grad, exact))
    torch.testing.assert_close(ours, theirs)


X = torch.ones(2, 3)
BAD = [
    (lambda: ops.softmax(X, 2), "softmax: dim is 2"),
    (lambda: ops.log_softmax(X, -3), "log_softmax: dim is -3"),
    (lambda: ops.softmax(X, dtype=torch.int64), "dtype is torch.int64"),
    (lambda: ops.softmax(X.long()), "dtype is torch.int64"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200
