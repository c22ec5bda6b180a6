"""FLOPs and bytes of single calls, against counts by hand."""

import pytest
import torch
import torch.nn.functional as F

from llmkern import ops, swap_
from llmkern.diagnose.run import trace
from llmkern.diagnose.workload import Workload


class Calls(torch.nn.Module):
    """A module that calls one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def only(function, *tensors):
    """The one call that `function` makes."""
    calls = trace(Workload(Calls(function), tensors, mode="inference")).calls
    assert len(calls) == 1, [call.op for call in calls]
    return calls[0]


def test_product():
    call = only(torch.mm, torch.randn(8, 16), torch.randn(16, 4))
    assert (call.flops, call.model_flops) == (2 * 8 * 16 * 4, 2 * 8 * 16 * 4)
    assert call.bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_sum_of_an_expanded_tensor_reads_it_once():
    call = only(lambda x: x.expand(100, 10) + 1.0, torch.randn(1, 10))
    assert call.bytes == 4 * (10 + 1000) and call.flops == 1000


def test_embedding_reads_only_its_rows():
    call = only(lambda i, w: F.embedding(i, w), torch.arange(5), torch.randn(1000, 8))
    assert call.bytes == 5 * 8 + 2 * 4 * 5 * 8 and call.flops == 0


def test_a_view_is_no_call():
    tracer = trace(Workload(Calls(lambda x: x.view(2, 8).t()[1:]), (torch.randn(16),), mode="inference"))
    assert tracer.calls == []


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_torch_and_ours_agree(causal):
    q = torch.randn(2, 3, 64, 16)
    theirs = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, q + 1, q + 2)
    ours = only(lambda q, k, v: ops.attention(q, k, v, is_causal=causal), q, q + 1, q + 2)
    pairs = 2 * 3 * 64 * 64
    assert theirs.model_flops == ours.model_flops == 4 * pairs * 16
    seen = (64 * 65 / 2 if causal else 64 * 64) / 64**2
    assert theirs.flops == pytest.approx(4 * pairs * 16 * seen)
    assert ours.flops == pytest.approx(theirs.flops, rel=0.05)  # ours counts more than products


def test_fused_adamw_reads_four_and_writes_three():
    model = torch.nn.Linear(64, 64, bias=False)
    workload = Workload(model, torch.randn(2, 64))
    workload.prepare()
    workload.step()
    call = next(c for c in trace(workload).calls if c.op == "aten._fused_adamw_")
    assert call.bytes == pytest.approx(7 * 4 * 64 * 64, rel=0.001) and call.flops == 14 * 64 * 64


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("return_logits", [False, True])
def test_model_flops_are_six_a_parameter_and_token(gpt, batch, swapped, return_logits):
    if swapped:
        swap_(gpt)
    idx, targets = batch
    workload = Workload(gpt, {"idx": idx, "targets": targets, "return_logits": return_logits})
    workload.prepare()
    workload.step()
    tokens, config = batch[0].numel(), gpt.config
    products = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    attention = config.n_layer * 12 * tokens * 32 * config.n_embd
    found = sum(call.model_flops for call in trace(workload).calls)
    assert found == 6 * products * tokens + attention
