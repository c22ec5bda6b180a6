"""The contract for values that are not numbers, sizes of zero and one, and rows that see nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded

from llmkern import ops
from llmkern.ops.activation import ACTIVATIONS, GATED

pytestmark = pytest.mark.usefixtures("strict")


def randn(*shape, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_nan_in_nan_out(backend: str, device: str):
    with ops.use(backend):
        q, k, v = (randn(1, 2, 40, 16, device=device) for _ in range(3))
        q[0, 0, 3, 5] = math.nan
        out = ops.attention(q, k, v, is_causal=True)
        assert out[0, 0, 3].isnan().all() and out.isnan().sum() == 16
        k[0, 1, 20, 0] = math.nan
        out = ops.attention(q, k, v, is_causal=True)
        assert out[0, 1, 20:].isnan().all() and not out[0, 1, :20].isnan().any()
        x = randn(4, 33, device=device)
        x[1, 32] = math.nan
        for y in (ops.layer_norm(x, (33,)), ops.rms_norm(x, (33,))):
            assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()
        losses = ops.cross_entropy(x, torch.zeros(4, dtype=torch.int64, device=device), reduction="none")
        assert losses.isnan().tolist() == [False, True, False, False]
        w = randn(33, 33, device=device)
        for activation in (*ACTIVATIONS, *GATED):
            y = ops.ffn(x, w, None, w, None, activation, weight_gate=w if activation in GATED else None)
            assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any(), activation


@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_rows_wider_than_a_block(backend: str, device: str, op):
    """Triton adds up the blocks of 8192 of a row; its mean is far from 0 here, and differs among them."""
    x = (randn(2, 8200, device=device) + torch.linspace(1, 9, 8200, device=device)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    with ops.use(backend):
        y = op(x, (8200,))
        y.sin().sum().backward()
    with ops.use("reference"):
        z = op(exact, (8200,))
        z.sin().sum().backward()
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing(backend: str, device: str):
    q, k, v = (randn(1, 2, 6, 16, device=device).requires_grad_() for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool, device=device)
    mask[2] = False
    with ops.use(backend):
        out, lse = ops.attention(q, k, v, mask, return_lse=True)
        out.sum().backward()
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    assert (q.grad[:, :, 2] == 0).all() and all(t.grad.isfinite().all() for t in (q, k, v))


def test_huge_logits(backend: str, device: str):
    z = torch.tensor([[1e38, -1e38, 0.0], [1e4, 1e4 + 1, 1e4 - 1], [-math.inf, 0.0, 1.0]], device=device)
    t = torch.tensor([0, 1, 2], device=device)
    with ops.use(backend):
        losses = ops.cross_entropy(z, t, reduction="none")
    exact = F.cross_entropy(z.double(), t, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)


def test_shift_changes_nothing(backend: str, device: str):
    """A common offset of the logits that float32 holds exactly leaves loss and gradient as they are."""
    z = (randn(5, 100, device=device) * 8).round() / 8
    t = torch.arange(5, device=device)
    results = []
    for offset in (0.0, 8192.0):
        logits = (z + offset).requires_grad_()
        with ops.use(backend):
            loss = ops.cross_entropy(logits, t, label_smoothing=0.1)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_all_targets_ignored(backend: str, device: str):
    z = randn(3, 5, device=device).requires_grad_()
    t = torch.full((3,), -100, device=device)
    with ops.use(backend):
        assert ops.cross_entropy(z, t).isnan()  # 0/0, as torch
        loss = ops.cross_entropy(z, t, reduction="sum")
        loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["start", "end"])
def test_no_read_or_write_outside(backend: str, device: str, dtype: torch.dtype, side: str):
    """Inputs whose storage touches an unmapped page: one element too far ends the process."""
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")

    def g(*shape):
        return guarded(randn(*shape).to(dtype), side).requires_grad_()

    with ops.use(backend):
        for s, d in ((5, 7), (33, 65)):
            ops.attention(
                g(1, 2, s, d), g(1, 1, s + 2, d), g(1, 1, s + 2, d), is_causal=True
            ).sum().backward()
            ops.layer_norm(g(s, d), (d,), g(d), g(d), residual=g(s, d))[0].sum().backward()
            ops.rms_norm(g(s, d), (d,), g(d)).sum().backward()
            ops.cross_entropy(g(s, d), torch.zeros(s, dtype=torch.int64)).backward()
            ops.ffn(g(s, d), g(d + 4, d), g(d + 4), g(d, d + 4), g(d), "gelu").sum().backward()


def test_one_tensor_as_query_key_and_value(backend: str, device: str):
    x = randn(1, 2, 17, 16, device=device).requires_grad_()
    with ops.use(backend):
        ops.attention(x, x, x).square().sum().backward()
    y = x.detach().double().requires_grad_()
    F.scaled_dot_product_attention(y, y, y).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)
