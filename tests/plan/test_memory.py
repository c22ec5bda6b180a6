"""Memory: the papers' formulas to the last digit, and what each way to divide the model must save."""

import dataclasses

import pytest

from llmkern.plan import RECIPES, Strategy, config, memory
from llmkern.plan.step import local_parameters

GPT3 = config.find("gpt3-175b")
MEGATRON = {"flash": False, "dropout": True}


def saved(s: Strategy, model=GPT3, seq: int = 2048) -> float:
    return memory.saved(model, s, seq, 2)


@pytest.mark.parametrize("t", [1, 8])
@pytest.mark.parametrize("b", [1, 4])
def test_korthikanti_table_2(t: int, b: int):
    s, d, a = 2048, GPT3.width, GPT3.heads
    sizes = {"tp": t, "micro_batch": b, **MEGATRON}
    assert saved(Strategy(**sizes)) == pytest.approx(s * b * d * (10 + 24 / t + 5 * a * s / (d * t)))
    assert saved(Strategy(**sizes, recompute="selective")) == pytest.approx(s * b * d * (10 + 24 / t))
    assert saved(Strategy(**sizes, sp=True, recompute="selective")) == pytest.approx(34 * s * b * d / t)
    assert saved(Strategy(**sizes, recompute="full")) == 2 * s * b * d
    assert saved(Strategy(**sizes, sp=True, recompute="full")) == 2 * s * b * d / t


def test_flash_stores_no_scores():
    """Its log-sum-exp takes 4 bytes a row and head instead of 2 s (no dropout)."""
    eager, flash = saved(Strategy(flash=False)), saved(Strategy())
    assert eager - flash == 2048 * GPT3.heads * (2 * 2048 - 4)


def test_fused_parts_save():
    llama = config.find("llama-3.1-8b")
    plain, fused = saved(Strategy(), llama), saved(Strategy(fused_ffn=True), llama)
    assert plain - fused == 2048 * 2 * 2 * llama.ffn
    sizes = [memory.logits(llama, Strategy(loss=kind), 8192, 2) for kind in ("eager", "fused", "linear")]
    assert sizes == [14 * 8192 * 128256, 4 * 8192 * 128256, 2 * 8192 * 4096]


def test_context_parallelism_divides_tokens():
    assert saved(Strategy(cp=4), seq=8192) == saved(Strategy(), seq=2048)


def test_zero_stages():
    """ZeRO, figure 1, in GB: 120, 31.4, 16.6, 1.9."""
    expected = {0: 120, 1: 30 + 90 / 64, 2: 15 + 105 / 64, 3: 120 / 64}
    for zero, gigabytes in expected.items():
        parts = memory.states(7.5e9, Strategy(dp=64, zero=zero), RECIPES["mixed"])
        assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes)


def test_pipeline_in_flight():
    assert memory.layers_in_flight(96, Strategy(pp=8), 100) == 96
    assert memory.layers_in_flight(96, Strategy(pp=8), 2) == 24
    assert memory.layers_in_flight(96, Strategy(pp=8, interleave=3), 100) == 96 * (1 + 7 / 24)


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt3-175b"])
def test_one_device_holds_all_parameters(name: str):
    model = config.find(name)
    assert local_parameters(model, Strategy()) == pytest.approx(model.total, rel=1e-12)


def test_parameters_divide():
    """Matrices by TP, experts by EP, norms by neither (the error of llm-analysis, issue 19)."""
    mixtral = config.find("mixtral-8x7b")
    parts = mixtral.parameters()
    halved = local_parameters(mixtral, Strategy(tp=2))
    router = 32 * 4096 * 8
    assert halved == pytest.approx((mixtral.total - parts["norms"] - router) / 2 + parts["norms"] + router)
    assert local_parameters(mixtral, Strategy(dp=8, ep=8)) == mixtral.total - parts["experts"] * 7 / 8


def test_last_stage_may_be_the_most_loaded():
    """Few layers and many logits."""
    llama = config.find("llama-3.1-8b")
    s = Strategy(pp=8, micro_batch=4, recompute="full")
    assert memory.training(llama, s, RECIPES["mixed"], 32, 8192).stage == "last"
    assert (
        memory.training(llama, dataclasses.replace(s, loss="linear"), RECIPES["mixed"], 32, 8192).stage
        == "first"
    )
