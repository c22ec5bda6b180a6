"""FLOPs against the papers' closed forms and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmkern.models import GPT, preset
from llmkern.plan import config
from llmkern.plan.flops import CONVENTIONS, flops


@pytest.mark.parametrize("name", ["megatron-1.7b", "megatron-1t", "megatron-22b"])
def test_megatron_formulas(name: str):
    """arXiv:2104.04473, equation 3; arXiv:2205.05198, equation 7."""
    m, s = config.find(name), 2048
    per_token, block = flops(m, s), m.layers * m.width**2
    model = 72 * block * (1 + s / (6 * m.width) + m.vocab / (12 * m.layers * m.width))
    hardware = 96 * block * (1 + s / (6 * m.width) + m.vocab / (16 * m.layers * m.width))
    assert per_token.training() == pytest.approx(model, rel=1e-12)
    assert per_token.hardware("full") == pytest.approx(hardware, rel=1e-12)


def test_palm_formula():
    """6 N + 12 L H Q T, arXiv:2204.02311, appendix B, but for the weights of norms."""
    m = config.find("palm-540b")
    expected = 6 * m.total + 12 * m.layers * m.heads * m.head_dim * 2048
    assert flops(m, 2048).training() == pytest.approx(expected, rel=1e-4)


def test_conventions():
    per_token = flops(config.find("llama-3.1-405b"), 8192)
    full, causal, left_out = (per_token.training(name) for name in CONVENTIONS)
    assert full - causal == pytest.approx(causal - left_out)
    assert (full - left_out) / left_out == pytest.approx(0.083, abs=0.002)  # of a 405B at 8k: 8.3 %


def test_recomputation():
    per_token = flops(config.find("gpt3-175b"), 2048)
    assert per_token.hardware("none") == per_token.training()
    assert per_token.hardware("selective") - per_token.training() == per_token.attention
    assert per_token.hardware("full") - per_token.training() == per_token.layers + per_token.attention
    assert per_token.hardware("ops") - per_token.training() == per_token.layers / 2


def test_torch_counts_the_same():
    """Products of our GPT, forward and backward, as torch counts them on meta tensors; no attention there."""
    shape = preset("shakespeare-char")
    with torch.device("meta"):
        model = GPT(shape, kernels=False)
        idx = torch.zeros(2, 256, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(idx, idx)[1].backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if op.__name__ in ("mm", "addmm")
    )
    assert counted == flops(config.find(shape), 256).training("left out") * 2 * 256


def test_experts_count_those_visited():
    m = config.find("mixtral-8x7b")
    matrices = m.active - m.parameters()["norms"] - m.parameters()["embedding"]
    assert flops(m, 1).training("left out") == pytest.approx(6 * matrices, rel=1e-6)
