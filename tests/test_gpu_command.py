"""python -m benchmarks.gpu where there is no GPU: it says so, and its dry run goes all the way."""

import json

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu, gpu_measure, gpu_peers, gpu_sanitize
from benchmarks.gpu_targets import Goal, goals
from llmkern.ops import OPS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_dry_run_goes_all_the_way(tmp_path, capsys, silent):
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "dry-run.json").read_text())
    assert len(results["targets"]) == len(list(goals())) and results["machine"]["torch"]
    for target in results["targets"]:
        assert {"llmkern", "eager"} <= target["seconds"].keys() and target["missed"] == [
            "a dry run judges nothing"
        ]
        assert target["op"] != "attention" or "sdpa-cudnn" in target["absent"]
    assert all({"llmkern", "eager"} <= step["seconds"].keys() for step in results["steps"])
    assert "attention: sdpa-cudnn is for GPUs" in (tmp_path / "dry-run.txt").read_text()


def test_list_names_targets_and_peers(capsys):
    assert gpu.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "attention fwd hd 128, causal, 8192" in out and "liger: " in out and "step GPT-2 124M" in out


def test_a_missed_target_is_named():
    goal = Goal("ffn", "fwd", "", None, 1.05, ("eager",), {"liger": 1.2}, 600.0, 0.9, 0.1)
    good = gpu_measure.Verdict("ffn", "fwd", "", times_faster={"eager": 1.1, "compile": 0.5, "liger": 1.3})
    good.teraflops, good.bandwidth, good.memory = 700.0, 0.95, 0.05
    assert not [*gpu_measure.misses(goal, good)]
    good.times_faster, good.teraflops, good.bandwidth, good.memory = (
        {"eager": 1.0, "liger": 1.0},
        1.0,
        0.1,
        0.5,
    )
    assert len([*gpu_measure.misses(goal, good)]) == 5


def test_a_peer_that_fails_is_told():
    verdict, calls = gpu_measure.Verdict("ffn", "fwd", ""), {}

    def fails():
        raise RuntimeError("no such kernel\nfor this GPU")

    gpu_measure.attempt("quack", fails, calls, verdict)
    assert verdict.absent == {"quack": "RuntimeError: no such kernel"} and not calls


def test_peers_are_named_or_say_why_not():
    for name in {goal.op for goal in goals()}:
        peers = gpu_peers.functions(OPS[name], "cuda")
        assert callable(peers["eager"]) and callable(peers["max-autotune"])
        assert all(callable(p) or "import" in p for p in peers.values())


@no_gpu
def test_sanitizer_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not gpu_sanitize.sanitize(tmp_path)
    assert "CUDA toolkit" in capsys.readouterr().err
