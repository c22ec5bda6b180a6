"""Bugs of others in attention, as tests."""

import math

import pytest
import torch
import torch.nn.functional as F
from here import GPU
from history.bugs import bug, close, far_apart, randn
from triton_interpreter import overflow_checks

from llmkern import ops

pytestmark = pytest.mark.usefixtures("strict")
on_gpu = pytest.mark.skipif(not GPU, reason="about compiled kernels of GPUs")


def gradients(function, *inputs, upstream=None):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out) if upstream is None else upstream)


def as_torch(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


@bug(1, "Dao-AILab/flash-attention#355")
def test_upstream_gradient_of_any_strides(backend: str, device: str):
    q, k, v = (randn(2, 3, 20, 16, device=device, seed=i) for i in range(3))
    upstream = randn(16, 20, 3, 2, device=device).permute(3, 2, 1, 0)
    with ops.use(backend):
        ours = gradients(ops.attention, q, k, v, upstream=upstream)
    theirs = gradients(as_torch, q.double(), k.double(), v.double(), upstream=upstream.double())
    for a, b in zip(ours, theirs):
        close(a, b)


@bug(2, "Dao-AILab/flash-attention#1500, #2260")
@bug(12, "pytorch#190857")
def test_offsets_beyond_int32(backend: str):
    """Both directions, with tensors whose batches lie more than 2³¹ elements apart."""
    q, k, v, d = (far_apart(2, 1, 8, 16) for _ in range(4))
    with ops.use(backend), overflow_checks():
        ours = gradients(ops.attention, q, k, v, upstream=d)
    near = [t.contiguous() for t in (q, k, v, d)]
    with ops.use(backend):
        same = gradients(ops.attention, *near[:3], upstream=near[3])
    for a, b in zip(ours, same):
        assert torch.equal(a, b)


@bug(3, "Dao-AILab/flash-attention#2541")
def test_slices_of_one_projection(backend: str, device: str):
    packed = randn(2, 19, 3, 2, 16, device=device)
    with ops.use(backend):
        ours = gradients(lambda x: ops.attention(*x.permute(2, 0, 3, 1, 4), is_causal=True), packed)
    theirs = gradients(lambda x: as_torch(*x.permute(2, 0, 3, 1, 4), is_causal=True), packed.double())
    close(ours[0], theirs[0])


@pytest.mark.parametrize("lengths", [(0, 7, 0, 4), (0, 0), (1, 0, 1)])
@bug(4, "Dao-AILab/flash-attention#2562")
@bug(5, "Dao-AILab/flash-attention#2421")
@bug(6, "Dao-AILab/flash-attention#1537")
def test_sequences_without_queries(lengths, backend: str, device: str):
    """Keys that nobody sees get gradient 0, not what the memory held."""
    cu_q = torch.tensor((0, *lengths), device=device).cumsum(0)
    cu_k = torch.tensor([0] + [3] * len(lengths), device=device).cumsum(0)
    q = randn(int(cu_q[-1]), 2, 8, device=device)
    k, v = (randn(int(cu_k[-1]), 2, 8, device=device, seed=i) for i in (1, 2))
    with ops.use(backend):
        dq, dk, dv = gradients(lambda q, k, v: ops.attention_varlen(q, k, v, cu_q, cu_k), q, k, v)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    for i, length in enumerate(lengths):
        if not length:
            assert not dv[3 * i : 3 * i + 3].any() and not dk[3 * i : 3 * i + 3].any()


@bug(7, "Dao-AILab/flash-attention#2324")
def test_gradients_behind_the_last_sequence_are_zero(backend: str, device: str):
    q, k, v = (randn(9, 1, 8, device=device, seed=i) for i in range(3))
    cu = torch.tensor((0, 4, 6), device=device)
    ops.empty_cache()
    with ops.use(backend):
        for g in gradients(lambda q, k, v: ops.attention_varlen(q, k, v, cu), q, k, v):
            assert not g[6:].any()


@bug(8, "Dao-AILab/flash-attention#2244, #1766")
@bug(33, "triton#8259, #6691; ROCm/aiter#5428")
def test_backward_is_deterministic(backend: str, device: str):
    q, k, v = (randn(1, 1, 70, 16, device=device, seed=i) for i in range(3))
    with ops.use(backend):
        first, *others = (gradients(ops.attention, q, k, v) for _ in range(30 if GPU else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@bug(9, "Dao-AILab/flash-attention#2777")
@bug(15, "pytorch#187506")
def test_last_stride_that_is_not_one(backend: str, device: str):
    """Where forward runs, backward runs."""
    q, k, v = (randn(1, 2, 16, 20, device=device, seed=i).transpose(2, 3) for i in range(3))
    with ops.use(backend):
        out, ours = ops.attention(q, k, v), gradients(ops.attention, q, k, v)
    exact = [t.double().contiguous() for t in (q, k, v)]
    close(out, as_torch(*exact))
    for a, b in zip(ours, gradients(as_torch, *exact)):
        close(a, b)


@bug(13, "pytorch#127055")
def test_window_longer_than_a_block(backend: str, device: str):
    length = 640
    q, k, v = (randn(1, 1, length, 8, device=device, seed=i) for i in range(3))
    place = torch.arange(length, device=device)
    seen = (place[:, None] - place).abs() <= 20
    with ops.use(backend):
        out = ops.attention(q, k, v, window=(20, 20))
    close(out, as_torch(q.double(), k.double(), v.double(), attn_mask=seen))


@bug(14, "pytorch#141128")
def test_nan_does_not_become_zero(backend: str, device: str):
    q, k, v = (torch.full((1, 1, 5, 8), math.nan, device=device) for _ in range(3))
    with ops.use(backend):
        assert ops.attention(q, k, v).isnan().all()


@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min"])
@bug(16, "pytorch#109517, #103963, #110213")
def test_rows_that_see_nothing(kind, backend: str, device: str):
    """0 for masks that hide; where all is as low as finfo.min, all keys weigh the same, as by softmax."""
    q, k, v = (randn(1, 1, 4, 8, device=device, seed=i) for i in range(3))
    low = {"bool": None, "-inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min}[kind]
    mask = torch.zeros(4, 4, device=device)
    mask[1] = 1 if low is None else low
    mask = ~mask.bool() if low is None else mask
    with ops.use(backend):
        out = ops.attention(q, k, v, mask)
        grads = gradients(lambda q, k, v: ops.attention(q, k, v, mask), q, k, v)
    expected = v.mean(2) if kind == "finfo.min" else torch.zeros_like(v[:, :, 1])
    close(out[:, :, 1], expected)
    assert all(g.isfinite().all() for g in grads)


@bug(17, "pytorch#101967")
def test_what_is_masked_must_be_finite_and_says_so():
    assert "Values at masked positions must be finite" in " ".join(ops.attention.__doc__.split())


@bug(23, "facebookresearch/xformers#719")
def test_lengths_beyond_int16():
    q, k, v = (randn(1, 1, 32769, 16, seed=i) for i in range(3))
    out = ops.attention(q, k, v, window=(16, 0))
    last = as_torch(q[:, :, -1:].double(), k[:, :, -17:].double(), v[:, :, -17:].double())
    close(out[:, :, -1:], last)


@on_gpu
@bug(34, "triton#11153, #11378")
def test_compiled_is_as_interpreted():
    """The interpreter's results are those of float64, and so must be the compiled kernel's."""
    q, k, v = (randn(2, 2, 70, 64, device="cuda", seed=i) for i in range(3))
    close(
        ops.attention(q, k, v, is_causal=True), as_torch(q.double(), k.double(), v.double(), is_causal=True)
    )
