"""enable_sdpa: every caller of scaled_dot_product_attention gets the kernel, and torch's comes back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.ops import dispatch


def inputs(grad: bool = False, heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, 7, 16, requires_grad=grad) for h in (4, heads, heads)]


MASK = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.3
CASES = {
    "plain": {}, "causal": {"is_causal": True},
    "bool mask": {"attn_mask": MASK | torch.eye(7, dtype=torch.bool)},
    "float mask": {"attn_mask": MASK * 1.0}, "scale": {"scale": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_same_numbers_forward_and_backward(case, compiled, strict):
    q, k, v = inputs(grad=True)
    expected = F.scaled_dot_product_attention(q, k, v, **CASES[case])
    grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    function = F.scaled_dot_product_attention
    if compiled:
        function = torch.compile(lambda *a, **kw: F.scaled_dot_product_attention(*a, **kw), fullgraph=True)
    with llmkern.enable_sdpa(), dispatch.record() as ran:
        out = function(q, k, v, **CASES[case])
        again = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert {half for half, _ in ran} == {"attention_fwd", "attention_bwd"}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-4)


def test_heads_shared_by_groups(strict):
    q, k, v = inputs(heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with llmkern.enable_sdpa(), dispatch.record() as ran:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    assert ran


def test_what_it_does_not_take_torch_computes():
    q, k, v = (t[0] for t in inputs())
    expected = F.scaled_dot_product_attention(q, k, v)
    llmkern.set_fallback("warn")
    with llmkern.enable_sdpa(), pytest.warns(llmkern.ops.FallbackWarning, match="3 dimensions, expected 4"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    with llmkern.enable_sdpa(), pytest.raises(RuntimeError):  # torch's own error
        F.scaled_dot_product_attention(q, k[:, :3], v)
    llmkern.set_fallback("warn")


def test_a_mask_and_is_causal_are_for_torch(strict):
    """Which of the two counts is torch's affair, and not the same on every device."""
    q, k, v = inputs()
    expected = F.scaled_dot_product_attention(q, k, v, torch.zeros(7, 7), is_causal=True)
    llmkern.set_fallback("silent")
    with llmkern.enable_sdpa(), dispatch.record() as ran:
        assert torch.equal(
            F.scaled_dot_product_attention(q, k, v, torch.zeros(7, 7), is_causal=True), expected
        )
    assert not ran


def test_fewer_heads_of_keys_are_refused_as_torch_does(strict):
    q, k, v = inputs(heads=2)
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(q, k, v)
    llmkern.set_fallback("silent")
    with llmkern.enable_sdpa(), pytest.raises(RuntimeError) as ours:
        F.scaled_dot_product_attention(q, k, v)
    assert str(ours.value).split("\n")[0] == str(theirs.value).split("\n")[0]


def test_layers_of_torch_in_training(strict):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    with llmkern.enable_sdpa(), dispatch.record() as ran:
        torch.testing.assert_close(layer(x), expected)
    assert ran["attention_fwd", "cpp"] == 1


def test_dropout_drops(strict):
    q, k, v = inputs()
    with llmkern.enable_sdpa():
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
        assert not torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)


def test_on_and_off():
    q, k, v = inputs()

    def ran() -> bool:
        with dispatch.record() as calls:
            F.scaled_dot_product_attention(q, k, v)
        return bool(calls)

    before = F.scaled_dot_product_attention(q, k, v)
    assert not ran()
    llmkern.enable_sdpa()
    with llmkern.enable_sdpa():  # it was on: it stays on
        assert ran()
    assert ran()
    llmkern.disable_sdpa()
    llmkern.disable_sdpa()
    assert not ran() and torch.equal(F.scaled_dot_product_attention(q, k, v), before)
