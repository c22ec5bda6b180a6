"""Step time: collectives by measured curves, the roofline, and what must slow a step down or speed it up."""

import dataclasses
from collections.abc import Iterable

import pytest

from llmkern.plan import RECIPES, Strategy, collectives, config, hardware, step, work
from llmkern.plan.hardware import Hardware
from llmkern.plan.step import predict

A100, H200 = hardware.find("a100"), hardware.find("h200")
GPT3 = config.find("gpt3-175b")


def test_measured_curve_comes_back():
    """nccl-tests: bus bandwidth is payload times factor over time."""
    for payload, expected in collectives.curve("8x-h200"):
        wire = payload * 2 * 7 / 8
        assert collectives.node_seconds(H200, wire) == pytest.approx(expected, rel=1e-9)
    assert collectives.curve("8x-h200")[2][1] == pytest.approx(2**20 * 1.75 / 39.93e9)


def test_payload_matters_more_than_the_link():
    """At 32 KiB the bus gives a 300th of its bandwidth at 16 GiB."""
    small = collectives.seconds(H200, "all_reduce", 2**15, 8, 8)
    large = collectives.seconds(H200, "all_reduce", 2**34, 8, 8)
    assert (2**34 / large) / (2**15 / small) > 300


def test_hierarchy():
    """Beyond a node each port carries its part of the payload; fewer devices a node share less."""
    size = 2**30
    wire = size / 8 * 2 * 3 / 4 / (collectives.NETWORK_PART * A100.network)
    inner = collectives.seconds(A100, "all_reduce", size, 8, 8)
    both = collectives.seconds(A100, "all_reduce", size, 32, 8)
    assert both == pytest.approx(inner + wire + collectives.latency("4x8-b200"))
    assert collectives.seconds(A100, "all_reduce", size, 32, 1) > 4 * both
    assert collectives.seconds(A100, "all_gather", size, 1, 8) == 0


@pytest.mark.parametrize("collective, times", [("all_reduce", 2), ("all_gather", 1), ("all_to_all", 1)])
def test_factors(collective: str, times: int):
    assert collectives.factor(collective, 8) == times * 7 / 8


def test_roofline():
    rates = work.Rates(matmul=100.0, memory=10.0)
    assert rates.seconds(work.Work("a", 200, 10)) == 2 and rates.wall(work.Work("a", 200, 10)) == "compute"
    assert rates.seconds(work.Work("b", 100, 30)) == 3 and rates.wall(work.Work("b", 100, 30)) == "memory"


def test_waves():
    """108 multiprocessors finish 108 tiles in one wave, and take two for 109."""
    rates = work.Rates(1.0, 1.0, units=108)
    full = rates.quantization(128 * 108, 256, 1)
    more = rates.quantization(128 * 108 + 1, 256, 1)
    assert full == 1 and 1 < more < 2


def flops_of(works: Iterable[work.Work]) -> float:
    return sum(w.flops for w in works)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b", "mixtral-8x7b", "deepseek-v3"])
def test_the_work_of_a_layer_is_that_of_the_model(name: str, flash: bool):
    """Forward products add up to the model's FLOPs, backward to twice as many; flash does half, and again."""
    from llmkern.plan.flops import flops

    model, s, seq = config.find(name), Strategy(flash=flash), 1024
    per_token = flops(model, seq)
    sums = [0.0, 0.0]
    for expert, layers in ((False, model.layers - model.expert_layers), (True, model.expert_layers)):
        if layers:
            sums[0] += layers * flops_of(work.forward(model, s, seq, expert)) / seq
            sums[1] += layers * flops_of(work.backward(model, s, seq, 2, expert)) / seq
    core = per_token.attention * (0.5 if flash and model.causal else 1)
    assert sums[0] == pytest.approx(per_token.layers + core, rel=1e-9)
    assert sums[1] == pytest.approx(2 * per_token.layers + core * (2.5 if flash else 2), rel=1e-9)


def test_tensor_parallelism_divides_the_work():
    whole = flops_of(work.forward(GPT3, Strategy(), 2048))
    assert flops_of(work.forward(GPT3, Strategy(tp=8), 2048)) == pytest.approx(whole / 8)


def seconds(batch: int = 64, **fields) -> step.StepTime:
    return predict(GPT3, A100, Strategy(**fields), RECIPES["megatron"], batch, 2048)


def test_bubble():
    """(p - 1) / (v m) of the work (arXiv:2104.04473, section 2.2), here without the output embedding."""
    once, thrice = seconds(tp=8, pp=8), seconds(tp=8, pp=8, interleave=4)
    assert once.bubble / (once.total - once.bubble) == pytest.approx(7 / 64, rel=0.1)
    assert thrice.bubble == pytest.approx(once.bubble / 4, rel=0.05)


def test_volumes():
    """Bytes on the wire a step: DDP 2 (n-1)/n N, FSDP (n-1)/n (2 x 2 N + gradients) a micro-batch, TP."""
    gpt2 = config.find("gpt2")

    def volume(**fields) -> dict[str, float]:
        return predict(gpt2, A100, Strategy(**fields), RECIPES["mixed"], 16, 1024).volume

    assert volume(dp=8)["DP gradients"] == pytest.approx(2 * 7 / 8 * 2 * gpt2.total)
    assert volume(dp=8, zero=1)["DP gradients"] == pytest.approx(7 / 8 * (2 + 2) * gpt2.total)
    root = (50257 + 1024 + 2) * gpt2.width  # is gathered once: it stays for backward
    layers = gpt2.total - root
    assert volume(dp=8, zero=3)["FSDP"] == pytest.approx(2 * 7 / 8 * (6 * layers + 4 * root))
    tokens = 16 * 1024
    once = 2 * 3 / 4 * 2 * tokens * gpt2.width  # an all-reduce of x; with SP a gather and a scatter
    norms = (2 * 2 * 12 + 2) * gpt2.width + 1024 * gpt2.width + 12 * 2 * gpt2.width  # positions, biases
    for sp in (False, True):
        found = volume(tp=4, sp=sp)
        assert found["TP"] == pytest.approx(4 * once * gpt2.layers)
        assert found["TP embedding"] == found["TP head"] == pytest.approx(once)
        assert found["TP loss"] == pytest.approx(2 * 3 / 4 * 3 * 4 * tokens)
        assert found.get("TP gradients", 0) == pytest.approx(sp * 2 * 3 / 4 * 2 * norms)
    ends = volume(tp=2, pp=2)
    assert "TP embedding" not in ends and ends["TP head"] == pytest.approx(once * 4 / 3 / 2)
    assert ends["PP embedding"] == pytest.approx(2 * 1 / 2 * 2 * 50257 * gpt2.width / 2)


def test_what_slows_and_what_speeds():
    base = {"tp": 8, "pp": 8, "interleave": 3, "flash": False}
    plain = seconds(**base, recompute="full").total
    assert seconds(**base, recompute="selective").total < plain
    assert seconds(**{**base, "flash": True}, recompute="full").total < plain
    assert seconds(**base, recompute="full", overlap_tp="none").total > plain
    assert seconds(**base, recompute="full", fused_sums=False).total > plain


def test_slow_network_is_the_wall():
    slow = dataclasses.replace(A100, network=A100.network / 1000)
    found = predict(GPT3, slow, Strategy(dp=64, tp=8, zero=1), RECIPES["mixed"], 64, 2048)
    assert found.wall == "communication"
    assert sum(found.walls.values()) == pytest.approx(found.total)


def test_measured_rates_are_taken_as_they_are():
    mine = Hardware(
        "x", "x", {"float32": 2e11}, 2**34, 2e10, matmul={"float32": 1e11}, measured={"date": "-"}
    )
    rates = work.rates(mine, "float32")
    assert rates.matmul == 1e11 and rates.memory == 1e10  # bytes are counted for 16 bits
