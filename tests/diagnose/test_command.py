"""`llmkern diagnose`: models by every kind of name, and what it refuses."""

import json
import re

import pytest
import torch

from llmkern.cli import main
from llmkern.diagnose import calibrate
from llmkern.diagnose.load import load
from llmkern.models import Llama, LlamaConfig, save_pretrained
from llmkern.plan import hardware

MODEL = """
import torch
from torch import nn
def make(): return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
def pair(): return nn.Linear(4, 4), torch.randn(2, 4)
def wrong(): return 3
def bare(): return nn.Linear(4, 4)
def boom(): raise KeyError("no\\nway")
"""


@pytest.fixture(autouse=True)
def _machine(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "profile", lambda *args: profile)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("def (")


def _refused(capsys, *argv):
    try:
        code = main(["diagnose", *argv])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error


def test_json_and_page(capsys, tmp_path):
    assert main(["diagnose", "mine.py:make", "--batch", "2", "--json", "--html", "a.html", "--apply"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["name"] == "mine.py:make" and data["tokens"] == 2 * 128
    assert data["after"]["prediction"]["peak_bytes"] == data["after"]["peak_bytes"]
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_terminal_and_the_name_under_which_plan_knows_the_machine(capsys):
    assert main(["diagnose", "mine:pair", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    name = re.search(r"plan MODEL --on (\S+)`", out).group(1)
    assert "Ops, longest first" in out and hardware.find(name).measured


def test_decode_shows_its_cache_and_reads_it():
    step = load("nano", 2, 16, "decode", "cpu")
    assert [t.shape[1] for t in step.kv_cache] == [2, 2]
    with torch.no_grad():
        out = step.model(step.batch)
        assert out.shape[:2] == (2, 1)
        assert step.model(step.batch.repeat(2, 1)).shape[0] == 4  # twice the batch
    assert int(step.model.caches[4].lengths.min()) == 17


def test_a_run_of_our_own_is_opened(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_pretrained(Llama(LlamaConfig(vocab_size=64, **sizes)), tmp_path / "model")
    subject = load(str(tmp_path / "model"), 1, 8, "inference", "cpu")
    assert isinstance(subject.model, Llama) and subject.batch[0].shape == (1, 8)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gpt3"], "did you mean"),
        (["gpt2", "--batch", "0"], "not a whole number of at least 1"),
        (["nano", "--length", "100000"], "takes at most"),
        (["mine:missing"], "mine has no function 'missing'"),
        (["mine:wrong"], "returned int, expected a torch.nn.Module"),
        (["mine:bare"], "without nn.Embedding; return (model, batch)"),
        (["mine:boom"], "mine:boom raised KeyError"),
        (["nowhere:make"], "cannot be imported: ModuleNotFoundError"),
        (["broken.py:make"], "cannot be imported: SyntaxError"),
        (["mine:make", "--mode", "decode"], "not a preset or a checkpoint"),
        (["mine:pair", "--html", "no/such/folder/a.html"], "its folder does not exist"),
    ],
)
def test_refused(capsys, argv, words):
    assert words in _refused(capsys, *argv)
