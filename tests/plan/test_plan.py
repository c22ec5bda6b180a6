"""`llmkern.plan`: what it finds, what it says when nothing fits, inference, energy, the command."""

import json
from itertools import pairwise

import pytest

import llmkern
from llmkern.cli import main
from llmkern.errors import UserError
from llmkern.plan import Strategy, config, energy, hardware, inference, record, simulate
from llmkern.plan.strategy import check


def test_finds_the_fastest_first():
    found = llmkern.plan("llama-3.1-8b", "h100", 8)
    times = [c.time.total for c in found.candidates]
    assert times == sorted(times) and 1 < len(times) <= 5
    for c in found.candidates:
        assert c.strategy.devices == 8
        assert c.memory.reserved < found.job.device.memory
    full, causal, left_out = found.mfu(found.best).values()
    assert 1 > full > causal > left_out > 0.2


def test_dtype_is_what_the_device_has():
    assert llmkern.plan("gpt2", "v100").job.dtype == "float16"
    machine = hardware.Hardware("m", "m", {"float32": 1e11}, 2**36, 1e10, measured={"date": "-"})
    found = llmkern.plan("nano", machine, recipe="float32")
    assert found.job.dtype == "float32" and 0 < found.mfu(found.best)["full"] < 1


def test_mesh():
    assert Strategy(dp=4, tp=2, zero=3).mesh == {"dp": 1, "fsdp": 4, "tp": 2, "pp": 1, "cp": 1}
    assert Strategy(dp=4, zero=1).mesh["fsdp"] == 4  # replicas would hold more than was planned
    assert Strategy(dp=4, pp=2).mesh == {"dp": 4, "fsdp": 1, "tp": 1, "pp": 2, "cp": 1}


def test_prints():
    assert "Fastest strategies that fit" in str(llmkern.plan("gpt2", "a100"))


def test_given_fields_stay():
    given = {"tp": 4, "zero": 1, "recompute": "full", "micro_batch": 2, "flash": False}
    found = llmkern.plan("gpt3-6.7b", "a100", 8, strategy=given)
    assert all(getattr(found.best.strategy, name) == value for name, value in given.items())


def test_less_recomputation_before_more():
    """On a large card nothing is computed twice."""
    assert llmkern.plan("gpt2", "h100", 1).best.strategy.recompute == "none"


def test_run_adds_up():
    found = llmkern.plan("gpt2", "a100", 8, tokens=1e9, price=2.0, goodput=0.5, pue=1.2, grid=100, power=300)
    run, best = found.run, found.best
    assert run.seconds == pytest.approx(2 * 1e9 / found.tokens_per_second(best))
    assert run.device_hours == pytest.approx(8 * run.seconds / 3600)
    assert run.dollars == pytest.approx(2 * run.device_hours)
    assert run.energy.kwh == pytest.approx(0.3 * run.device_hours * 1.2)
    assert run.energy.co2e == pytest.approx(run.energy.kwh * 0.1)


def test_fits_nowhere():
    """By how much in GiB and GB, and the nearest thing that fits, which does."""
    with pytest.raises(UserError, match=r"does not fit on 8 x NVIDIA A100.* GiB \(.* GB\) too much") as error:
        llmkern.plan("gpt3-175b", "a100", 8)
    more = int(str(error.value).rsplit(" ", 1)[1])
    assert llmkern.plan("gpt3-175b", "a100", more)
    with pytest.raises(UserError, match="does not fit"):
        llmkern.plan("gpt3-175b", "a100", more // 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tp": 5}, "tp is 5, which does not divide heads 96 of gpt3-175b; nearest is 4"),
        ({"pp": 10}, "pp x interleave is 10, which does not divide layers 96"),
        ({"ep": 2}, "ep is 2, which does not divide experts 1"),
        ({"dp": 3}, "dp x micro_batch is 3, which does not divide batch 64"),
        ({"cp": 3}, "cp is 3, which does not divide sequence length 2,048"),
        ({"tp": 0}, "tp is 0, expected at least 1"),
        (
            {"pp": 8, "interleave": 2, "dp": 16},
            "interleave is 2, which needs micro-batches in multiples of pp 8",
        ),
        ({"zero": 4}, "zero is 4, expected 0"),
        ({"recompute": "some"}, "recompute is 'some', expected one of none"),
    ],
)
def test_indivisible(fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        check(config.find("gpt3-175b"), Strategy(**fields), 64, 2048)


def test_llama_may_fill_its_stages_with_embeddings():
    """126 layers on 16 stages, as Llama 3 405B was trained; 125 would not do."""
    check(config.find("llama-3.1-405b"), Strategy(tp=8, pp=16, dp=64), 2048, 8192)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"recipe": "x"}, "recipe is 'x', expected one of mixed"),
        ({"kernels": "x"}, "kernels is 'x'"),
        ({"dtype": "float4"}, "dtype is 'float4', which NVIDIA A100"),
        ({"grid": "frnce"}, "grid is 'frnce', which is not known; did you mean france"),
        ({"pue": 0.5}, "pue is 0.5, expected at least 1"),
        ({"strategy": {"tp": 7}}, "tp 7 cannot use 1 device; expected sizes"),
    ],
)
def test_bad_input(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        llmkern.plan("gpt2", **{"on": "a100", **arguments})


def test_cache_of_a_token():
    """4.72 MB for GPT-3, 328 kB for Llama 70B with its 8 heads of keys, 70 kB for DeepSeek's latents."""
    expected = {"gpt3-175b": 4_718_592, "llama-3.1-70b": 327_680, "deepseek-v3": 70_272}
    assert {name: inference.cache_per_token(config.find(name)) for name in expected} == expected


def test_inference_walls():
    """One sequence decodes at the speed of memory; a long prompt waits for arithmetic."""
    llama, h100 = config.find("llama-3.1-8b"), hardware.find("h100")
    found = inference.predict(llama, h100, 1, 1, 2048, 256)
    assert (found.prefill_wall, found.decode_wall) == ("compute", "memory")
    bound = found.weights / h100.bandwidth
    assert bound < found.decode_seconds < 1.3 * bound
    many = inference.predict(llama, h100, 1, 64, 2048, 256)
    assert many.decode_rate > 20 * found.decode_rate
    read = many.weights + 64 * (2048 + 128) * many.cache_per_token  # every sequence reads its own cache
    assert read / h100.bandwidth < many.decode_seconds < 1.3 * read / h100.bandwidth


def test_energy_without_power():
    assert energy.run(hardware.find("tpu-v5p"), 10) is None


def test_command(capsys):
    assert main(["plan", "gpt2", "--on", "rtx-4090"]) == 0
    text = capsys.readouterr().out
    for words in (
        "124,439,808",
        "Fastest strategies",
        "GiB",
        "GB",
        "Not modelled",
        "full",
        "causal",
        "left out",
    ):
        assert words in text
    assert main(["plan", "--list"]) == 0
    assert "h100-sxm-80gb" in capsys.readouterr().out


def test_command_serves(capsys):
    """Inference needs no optimizer: 8 B fit on the one card that could not train them."""
    assert main(["plan", "llama-3.1-8b", "--on", "h100"]) == 2
    assert "--serve" in capsys.readouterr().err
    assert main(["plan", "llama-3.1-8b", "--on", "h100", "--serve"]) == 0
    assert "decode" in capsys.readouterr().out
    assert main(["plan", "llama-3.1-405b", "--on", "rtx-4090", "--serve"]) == 2
    assert "needs 756.0 GiB (811.7 GB)" in capsys.readouterr().err


def test_command_prints_json(capsys):
    assert main(["plan", "gpt2", "--on", "a100", "--gpus", "4", "--tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_parameters"] == 124_439_808
    assert {s["strategy"]["tp"] for s in found["strategies"]} == {2}
    first = found["strategies"][0]
    assert sum(first["time"]["walls"].values()) == pytest.approx(first["time"]["total"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpt2", "--on", "h1000"], "hardware is 'h1000', which is not in the catalogue; did you mean"),
        (["gpt-22"], "model is 'gpt-22', neither a file (config.json) nor a known name; did you mean"),
        ([], "MODEL is missing"),
    ],
)
def test_command_bad_input(arguments: list[str], message: str, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_simulate(tmp_path, capsys):
    """From 1 to 16,384 devices; the step gets no slower, and a plot is drawn."""
    pytest.importorskip("matplotlib")
    points = simulate.scaling("gpt2", "a100")
    assert [p.devices for p in points] == [2**i for i in range(15)]
    same = [p for p in points if p.batch == points[0].batch]
    assert all(b.seconds < a.seconds for a, b in pairwise(same))
    assert simulate.plot(tmp_path / "s.png", points, "a100").stat().st_size > 10_000


def test_published_runs_are_the_papers():
    """Llama 3 prints 43 % and 41 %; Megatron's 1T at 163 TFLOP/s with recomputation is 39 % without."""
    runs = record.points()
    assert {run.paper for run in runs} == set(record.PAPERS.values())
    llama = [run.published for run in runs if run.paper.startswith("Llama")]
    assert llama[0] == pytest.approx(0.43, abs=0.01) and llama[1] == pytest.approx(0.41, abs=0.01)
    (largest,) = [run for run in runs if run.devices == 3072 and "2021" in run.paper]
    assert largest.published == pytest.approx(0.393, abs=0.002)
    assert largest.planned == pytest.approx(largest.published, rel=0.08)
