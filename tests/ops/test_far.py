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
