"""Dropout: what is dropped, that every backend drops the same, modules, bad input."""

import math

import pytest
import torch

from llmkern import ops
from llmkern.nn import Dropout

SEED = torch.tensor(1234567890123456789)


def kept(x: torch.Tensor, p: float, backend: str, seed: torch.Tensor = SEED) -> torch.Tensor:
    with ops.use(backend):
        return ops.dropout(torch.ones_like(x), p, seed=seed) != 0


def test_every_backend_drops_the_same(backend: str, device: str, strict):
    for shape in ((3, 200), (2, 5, 64), (7,)):
        x = torch.ones(shape, device=device)
        assert torch.equal(kept(x, 0.3, backend), kept(x, 0.3, "reference"))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p: float):
    y = ops.dropout(torch.ones(500, 1000), p, seed=SEED)
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / y.numel())
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_seeds():
    x = torch.ones(4, 256)
    assert not torch.equal(kept(x, 0.5, "cpp"), kept(x, 0.5, "cpp", SEED + 1))
    torch.manual_seed(3)
    first, second = ops.dropout(x), ops.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, ops.dropout(x)) and not torch.equal(first, second)


def test_backward_drops_the_same(backend: str, device: str, strict):
    x = torch.full((5, 70), 2.0, device=device, requires_grad=True)
    residual = torch.ones(5, 70, device=device, requires_grad=True)
    with ops.use(backend):
        y = ops.dropout(x, 0.4, seed=SEED, residual=residual)
        y.sum().backward()
    torch.testing.assert_close(y.detach(), 1 + 2 * x.grad)
    assert (residual.grad == 1).all() and torch.equal(x.grad != 0, kept(x, 0.4, backend))


def test_nothing_is_dropped():
    x = torch.randn(3, 4)
    assert ops.dropout(x, 0.5, training=False) is x and ops.dropout(x, 0.0) is x
    assert torch.equal(ops.dropout(x, 0.5, False, residual=x), 2 * x)


def test_module(strict):
    x = torch.ones(64, 64)
    torch.manual_seed(0)
    module = Dropout(0.5)
    assert (module(x) == 0).any() and (module(x, x) == 1).any()
    assert module.eval()(x) is x
    inplace = Dropout(0.5, inplace=True)
    assert inplace(x) is x and (x == 0).any()


def test_no_mask_is_stored(strict):
    x = torch.ones(1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.dropout(x)
    assert sum(saved) == 1


X = torch.ones(2, 3)
BAD = [
    (lambda: ops.dropout(X, 1.5), "p is 1.5"),
    (lambda: ops.dropout(X, -0.1), "p is -0.1"),
    (lambda: ops.dropout(X.long()), "x is torch.int64"),
    (lambda: ops.dropout(X, residual=X[0]), "residual is torch.float32 of shape (3,)"),
    (lambda: ops.dropout(X, seed=torch.tensor([1, 2])), "dropout seed is torch.int64 of shape (2,)"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200
