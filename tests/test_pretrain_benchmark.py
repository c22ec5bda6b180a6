"""`benchmarks.pretrain`: both trainers see the same windows, and their losses are compared step by step."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import pretrain

    return pretrain


def test_all_trainers_tell_the_same_losses(pretrain, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    small = {"batch_size": 2, "steps": 12, "eval_every": 4, "eval_batches": 2, "save_every": 4}
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    monkeypatch.setitem(pretrain.RECIPES, "nano", {**small, **sizes})
    assert pretrain.main(["--data", str(text), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("pretrain-nano-*.json")
    found = json.loads(path.read_text())["trainers"]
    assert list(found) == ["nanoGPT-like", "llmkern float32", "llmkern bfloat16"]
    peer = found["nanoGPT-like"]
    assert [step for step, _, _ in peer["validations"]] == [0, 4, 8, 12] and len(peer["loss"]) == 12
    for name, most in {"llmkern float32": 2e-5, "llmkern bfloat16": 0.05}.items():
        ours = found[name]
        assert max(abs(a - b) for a, b in zip(peer["loss"], ours["loss"])) < most
        for (step, _, theirs), (same, _, mine) in zip(peer["validations"], ours["validations"]):
            assert step == same and abs(theirs - mine) < most
    assert peer["validations"][-1][2] < peer["validations"][0][2]
    assert path.with_suffix(".png").exists()
    assert "losses of all steps apart by at most" in capsys.readouterr().out
