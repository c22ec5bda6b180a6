"""Offsets beyond 2³¹ elements, in memory of which three places are touched, and a million tokens."""

import contextlib

import pytest
import torch
from torch import Tensor

from llmkern import ops

pytestmark = pytest.mark.usefixtures("strict")
FAR = 2**30 + 2**20  # a stride that 32 bits hold, twice which they do not


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def far(t: Tensor) -> Tensor:
    """The same values, with the last of three parts of the first dimension beyond 2³¹ elements."""
    memory = torch.empty(
        2 * FAR + t[0].numel(), dtype=t.dtype
    )  # the system gives pages when they are touched
    return memory.as_strided(t.shape, (FAR, *t.stride()[1:])).copy_(t)


def attention(q, k, v):
    return ops.attention(q, k, v, is_causal=True)


def decode(q, k_cache, v_cache):
    return ops.decode_attention(q, k_cache, v_cache, torch.tensor([20, 9, 1]))


def linear_cross_entropy(x, head):
    return ops.linear_cross_entropy(x, head, torch.tensor([0, 1, 2, 1]), reduction="none")


TABLES = ops.rope_table(20, 16)
CASES = {
    "attention": (attention, [randn(3, 1, 20, 16)] * 3),
    "decode_attention": (decode, [randn(3, 1, 1, 16), randn(3, 1, 20, 16), randn(3, 1, 20, 16)]),
    "rope": (lambda q: ops.rope(q, None, *TABLES), [randn(3, 1, 20, 16)]),
    "linear": (ops.linear, [randn(4, 16), randn(3, 16)]),
    "linear_cross_entropy": (linear_cross_entropy, [randn(4, 16), randn(3, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_strides_beyond_32_bits(backend: str, device: str, name: str):
    """The interpreter reports products of 32 bits that overflow; compiled code would read elsewhere."""
    if device != "cpu":
        pytest.skip("takes memory that is never touched, which a GPU does not have")
    from triton_interpreter import overflow_checks

    function, tensors = CASES[name]
    results = []
    for layout in (Tensor.clone, lambda t: far(t) if t.shape[0] == 3 else t.clone()):
        leaves = [layout(t).requires_grad_(name != "decode_attention") for t in tensors]
        with ops.use(backend), overflow_checks() if backend == "triton" else contextlib.nullcontext():
            out = function(*leaves)
            grads = torch.autograd.grad(out.float().square().sum(), leaves) if out.requires_grad else ()
        results.append((out, *grads))
    for near, away in zip(*results):
        torch.testing.assert_close(away, near, rtol=0, atol=0)


ROWS, WIDTH = 2**20 + 2, 2**11  # of bfloat16: 4 GiB; what is never written takes no memory
TARGETS = torch.zeros(ROWS, dtype=torch.int64)


def losses(z):
    return ops.cross_entropy(z, TARGETS[: len(z)], reduction="none", label_smoothing=0.1)


LARGE = {
    "layer_norm": lambda x: ops.layer_norm(x, (WIDTH,)),
    "rms_norm": lambda x: ops.rms_norm(x, (WIDTH,)),
    "softmax": lambda x: ops.softmax(x, -1),
    "log_softmax": lambda x: ops.log_softmax(x, -1),
    "cross_entropy": losses,
    "linear": lambda x: ops.linear(x, randn(3, WIDTH)),
    "ffn": lambda x: ops.ffn(x, randn(5, WIDTH), None, randn(3, 5), None, "gelu"),
}


def large(*values: Tensor) -> Tensor:
    """(ROWS, WIDTH), zeros but for the last rows."""
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    for i, value in enumerate(values, ROWS - len(values)):
        x[i] = value
    return x


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_last_of_many_rows(name: str):
    """Behind 2³¹ elements a row gives, forward and backward, what it gives among 32."""
    last = randn(32, WIDTH)
    results = []
    for x in (large(*last), last.clone()):
        y = LARGE[name](x.requires_grad_())[-32:]
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y[-2:].detach().clone(), dx[-2:].clone()))
    for far_away, near in zip(*results):
        assert torch.equal(far_away, near)


@pytest.mark.slow
def test_the_last_of_many_elements():
    """Of a table, of a gradient, of what is dropped."""
    row = randn(WIDTH).abs() + 1
    x = large(row)
    assert torch.equal(
        ops.embedding(torch.tensor([ROWS - 1, 0]), x), torch.stack((row, torch.zeros_like(row)))
    )
    assert ops.grad_norm([x]).item() == pytest.approx(row.double().norm().item(), rel=1e-6)
    dropped = ops.dropout(x, 0.5)[-1]
    assert set((dropped / row).tolist()) == {0.0, 2.0} and 0.4 < (dropped == 0).float().mean() < 0.6


@pytest.mark.slow
def test_a_million_tokens():
    """The last queries of 2²⁰ give what they give behind the keys of their windows alone."""
    q, k, v = (randn(1, 1, 2**20, 16) for _ in range(3))
    options = {"is_causal": True, "window": (64, 0)}
    out = ops.attention(q, k, v, **options)
    last = [t[:, :, -164:] for t in (q, k, v)]
    torch.testing.assert_close(
        out[:, :, -100:], ops.attention(*last, **options)[:, :, -100:], rtol=0, atol=1e-2
    )
