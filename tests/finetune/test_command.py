"""`llmkern finetune` and `llmkern evaluate`, from a checkpoint and a table to a classifier."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from llmkern.cli import main
from llmkern.models import GPT, Classifier, GPTConfig, save_pretrained
from llmkern.text import ByteTokenizer, CharTokenizer
from llmkern.train import checkpoint

TOKENIZER = CharTokenizer("abcdefgh ")
QUICK = ("--epochs", 6, "--learning-rate", 3e-3, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    checkpoint.save(path, 3, GPT(GPTConfig(len(TOKENIZER), 16, 1, 2, 32)), TOKENIZER)
    return path


def _table(path, count=120, labels=("vowels", "others"), seed=0):
    """Texts with, or without, the letters a and e."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            letters = "aeaebcd " if i % 2 == 0 else "bcdfgh "
            text = "".join(draw.choice(letters) for _ in range(draw.randint(5, 20)))
            file.write(json.dumps({"text": f"b{text}", "label": labels[i % 2]}) + "\n")
    return path


def _run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def _refused(capsys, *argv):
    assert main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("llmkern: ")
    return error


@pytest.mark.parametrize("lora", [0, 4])
def test_classify(capsys, base, tmp_path, lora):
    data, out = _table(tmp_path / "data.jsonl"), tmp_path / "out"
    options = ("--lora", lora, "--learning-rate", 1e-2) if lora else ()
    said = _run(capsys, "finetune", base, data, "--out", out, *QUICK, *options)
    assert "108 to train on, 12 to validate with" in said and "others, vowels" in said
    report = json.loads((out / "finetune.json").read_text())
    assert report["accuracy"] > (0.6 if lora else 0.85) and report["texts"] == 12
    assert report["epochs"][-1]["loss"] < report["epochs"][0]["loss"] - (0.05 if lora else 0.2)
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    model = checkpoint.load(out).build_model()
    assert isinstance(model, Classifier) and model.config.labels == ("others", "vowels")
    start = checkpoint.load(base).build_model()
    frozen = torch.equal(model.base.transformer.wte.weight, start.transformer.wte.weight)
    assert frozen == bool(lora)
    assert (out / "lora.safetensors").exists() == bool(lora)
    if lora:  # what was saved is the base with the updates
        updates = load_file(out / "lora.safetensors")
        a, b = (updates[f"base.transformer.h.0.mlp.c_fc.lora_{x}"] for x in "AB")
        expected = start.transformer.h[0].mlp.c_fc.weight + 2 * b @ a
        torch.testing.assert_close(model.base.transformer.h[0].mlp.c_fc.weight, expected)
    fresh = _table(tmp_path / "fresh.jsonl", seed=5)
    said = _run(capsys, "evaluate", out, fresh, "--out", tmp_path / "scores", "--device", "cpu")
    assert "120 texts: accuracy" in said and "as vowels" in said
    assert json.loads((tmp_path / "scores/evaluation.json").read_text())["accuracy"] > (0.6 if lora else 0.8)
    assert (tmp_path / "scores/confusion.png").exists()
    assert "cannot generate text" in _refused(capsys, "generate", out)


def test_same_seed_same_classifier(capsys, base, tmp_path):
    data = _table(tmp_path / "data.jsonl", 40)
    for name in "ab":
        _run(capsys, "finetune", base, data, "--out", tmp_path / name, *QUICK[:1], 2, *QUICK[2:])
    a, b = (checkpoint.load(tmp_path / name).model_tensors() for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_early_stopping_keeps_the_best(capsys, base, tmp_path):
    """With a rate at which it only gets worse, the first epoch stays."""
    data = _table(tmp_path / "data.jsonl", 40)
    wild = ("--learning-rate", 3.0, "--epochs", 9, "--patience", 2)
    said = _run(capsys, "finetune", base, data, "--out", tmp_path / "out", *QUICK, *wild)
    report = json.loads((tmp_path / "out/finetune.json").read_text())
    losses = [epoch["val_loss"] for epoch in report["epochs"]]
    assert len(losses) < 9 and "Stopped: 2 epochs without a smaller held-out loss." in said
    assert losses.index(min(losses)) == len(losses) - 3
    assert report["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_options(capsys, base, tmp_path):
    data, val = _table(tmp_path / "d.jsonl", 60, ("1", "0")), _table(tmp_path / "v.jsonl", 10, ("1", "0"), 3)
    said = _run(
        capsys, "finetune", base, data, "--val", val, "--label-map", "0=no,1=yes", "--out", tmp_path / "out",
        "--class-weights", "balanced", "--max-tokens", 5, *QUICK[:1], 1, *QUICK[2:],
    )  # fmt: skip
    assert "60 to train on, 10 to validate with" in said and "no, yes" in said
    assert "texts were longer than 5 tokens, and cut" in said
    on = _run(capsys, "finetune", tmp_path / "out", data, "--out", tmp_path / "on", *QUICK[:1], 1, *QUICK[2:])
    assert "labels   0, 1" in on  # other labels, another head


def test_hugging_face_base(capsys, tmp_path):
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig(256, 32, 1, 2, 32)), tmp_path / "hf", dtype=torch.bfloat16)
    ByteTokenizer().save(tmp_path / "hf")
    data = _table(tmp_path / "d.jsonl", 20)
    _run(capsys, "finetune", tmp_path / "hf", data, "--out", tmp_path / "out", *QUICK[:1], 1, *QUICK[2:])
    assert checkpoint.load(tmp_path / "out").build_model().score.weight.dtype == torch.float32


@pytest.mark.parametrize("lora", [0, 4])
def test_causal(capsys, base, tmp_path, lora):
    (tmp_path / "text.txt").write_text("abc def gh " * 120)
    out = tmp_path / "out"
    options = ("--lora", lora, "--learning-rate", 2e-2) if lora else ()
    _run(capsys, "finetune", base, tmp_path / "text.txt", "--task", "causal", "--out", out, *QUICK, *options)
    before, after = (
        float(_run(capsys, "evaluate", path, tmp_path / "text.txt").split("loss ")[1].split(" ")[0])
        for path in (base, out)
    )
    assert after < before - (0.3 if lora else 0.7)
    assert _run(capsys, "generate", out, "--prompt", "abc", "--max-new-tokens", 5).startswith("abc")


def test_evaluate_text(capsys, base, tmp_path):
    (tmp_path / "text.txt").write_text("abc def gh " * 20)
    said = _run(capsys, "evaluate", base, tmp_path / "text.txt", "--out", tmp_path)
    assert said.startswith("219 tokens: loss 2.") and "bits per byte" in said
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["bytes"] == 219 and report["bits_per_byte"] == pytest.approx(
        report["loss"] / 0.6931, rel=1e-3
    )
    assert "10 tokens" in _run(capsys, "evaluate", base, tmp_path / "text.txt", "--max-tokens", 11)
    assert "--batch-size is 0" in _refused(capsys, "evaluate", base, tmp_path / "text.txt", "--batch-size", 0)
    assert "is not in the vocabulary" in _refused(capsys, "evaluate", base, __file__)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (("--epochs", 0), "--epochs is 0, expected 1 or more"),
        (("--val-share", 1.0), "--val-share is 1.0, expected more than 0, and less than 1"),
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--label-map", "a:b"), "--label-map has 'a:b', expected OLD=NEW"),
        (("--label-map", "vowels=x,others=x"), "all 20 rows have the label 'x'"),
        (("--label-column", "class"), "has no column 'class' (it has text, label)"),
        (("--val", "nowhere.csv"), "'nowhere.csv' cannot be read"),
    ],
)
def test_refuses(capsys, base, tmp_path, argv, match):
    data = _table(tmp_path / "d.jsonl", 20)
    error = _refused(capsys, "finetune", base, data, "--out", tmp_path / "out", *argv)
    assert match in error
    assert not (tmp_path / "out").exists()


def test_refuses_unseen_labels_and_old_folders(capsys, base, tmp_path):
    data, val = _table(tmp_path / "d.jsonl", 20), _table(tmp_path / "v.jsonl", 4, ("vowels", "numbers"))
    out = ("--out", tmp_path / "out", *QUICK[:1], 1)
    error = _refused(capsys, "finetune", base, data, "--val", val, *out)
    assert "v.jsonl:2 has the label 'numbers', expected one of others, vowels" in error
    _run(capsys, "finetune", base, data, *out)
    assert "holds a run already; choose another folder" in _refused(capsys, "finetune", base, data, *out)
