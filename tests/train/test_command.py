"""`llmkern train` as a user has it: configs, what it writes, and one sentence for each mistake."""

import importlib.util
import json
import math
import resource
import shutil

import pytest
import small_run
import torch

from llmkern import cli
from llmkern.models import BERT
from llmkern.text.shards import Data
from llmkern.train import checkpoint
from llmkern.train.log import read_log
from llmkern.train.loop import Trainer

SIZES = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "8", "--batch-size", "2"]
QUICK = ["--steps", "4", "--warmup-steps", "2", "--eval-every", "2", "--eval-batches", "1", "--plot", "false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(small_run.make_data(tmp_path_factory.mktemp("train") / "data"))


@pytest.fixture
def train(data, tmp_path, capsys):
    """Runs the command with small sizes; returns its exit code, and what it printed and complained."""

    def run(*argv, config=(), out="run"):
        code = cli.main(
            ["train", *config, "--data", data, "--out", str(tmp_path / out), *SIZES, *QUICK, *argv]
        )
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def _losses(path):
    return [line["loss"] for line in read_log(path) if "loss" in line]


def _refused(result, *says):
    code, _, err = result
    assert code == 2 and err.startswith("llmkern: ") and err.count("\n") == 1, err
    for part in says:
        assert part in err, err


def test_what_it_shows_and_writes(train, tmp_path):
    board = importlib.util.find_spec("tensorboard") is not None
    options = "--plot", "true", "--tensorboard", str(board).lower()
    code, out, _ = train(*options)
    assert code == 0
    for part in (
        "GPT, ",
        "4 steps of 16 tokens, causal, in float32 on cpu",
        "tokens/s, MFU",
        "s left",
        "perplexity",
    ):
        assert part in out
    run = tmp_path / "run"
    lines = read_log(run)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "seconds"} == lines[1].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not board or list((run / "tensorboard").iterdir())
    assert [p.name for p in checkpoint.folders(run)] == ["step-00000004"]
    code, out, _ = train(*options)
    assert code == 0 and "is finished; more steps go on from there" in out


def test_a_file_and_the_command_line_over_it(train, tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "a.toml").write_text(
        'schedule = "wsd"\nlearning_rate = 2e-3\nbetas = [0.9, 0.99]\nseed = 1\n'
    )
    (tmp_path / "a.yaml").write_text("schedule: wsd\nlearning_rate: 2.0e-3\nbetas: [0.9, 0.99]\nseed: 1\n")
    for kind in ("toml", "yaml"):
        assert train("--seed", "5", config=[str(tmp_path / f"a.{kind}")], out=kind)[0] == 0
    arguments = ["--schedule", "wsd", "--learning-rate", "2e-3", "--betas", "0.9,0.99", "--seed", "5"]
    assert train(*arguments, out="arguments")[0] == 0
    assert train(config=[str(tmp_path / "arguments/config.toml")], out="again")[0] == 0  # what a run wrote
    first = _losses(tmp_path / "toml")
    assert all(_losses(tmp_path / name) == first for name in ("yaml", "arguments", "again"))


def test_accumulated_batches_are_one_large_batch(train, tmp_path):
    assert train("--batch-size", "4", out="large")[0] == 0
    assert train("--accumulate", "2", out="small")[0] == 0
    torch.testing.assert_close(_losses(tmp_path / "large"), _losses(tmp_path / "small"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "argv",
    [
        ["--objective", "masked"],
        ["--objective", "masked", "--activation-checkpointing", "true", "--dropout", "0.1"],
        ["--activation-checkpointing", "true", "--dropout", "0.1", "--dtype", "bfloat16"],
        ["--dtype", "float16", "--grad-clip", "0"],
        ["--kernels", "false", "--bias", "false"],
    ],
    ids=" ".join,
)
def test_resumed_is_unbroken(train, tmp_path, argv):
    """Steps 1 to 4 at once, and in two runs, give the same losses and the same weights."""
    argv = ["--schedule", "constant", *argv]
    assert train(*argv, out="whole")[0] == 0
    assert train(*argv, "--steps", "2", out="parts")[0] == 0
    assert train(*argv, out="parts")[0] == 0
    whole, parts = ({
        name: (tmp_path / out / f"checkpoints/step-00000004/{name}.safetensors").read_bytes()
        for name in ("model", "optimizer")
    } for out in ("whole", "parts"))  # fmt: skip
    assert whole == parts and _losses(tmp_path / "whole") == _losses(tmp_path / "parts")
    assert isinstance(checkpoint.load(tmp_path / "whole").build_model(), BERT) == ("masked" in argv)


def test_activation_checkpointing_and_kernels_change_no_loss(train, tmp_path):
    for out, argv in {
        "a": [],
        "b": ["--activation-checkpointing", "true"],
        "c": ["--kernels", "false"],
    }.items():
        assert train(*argv, out=out)[0] == 0
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    torch.testing.assert_close(_losses(tmp_path / "a"), _losses(tmp_path / "c"), rtol=1e-5, atol=1e-5)


def test_init_starts_from_weights(train, data, tmp_path):
    assert train()[0] == 0
    start = str(tmp_path / "run")
    assert train("--init", start, out="next")[0] == 0
    first = read_log(tmp_path / "next")[0]["val_loss"]
    assert first == read_log(tmp_path / "run")[-1]["val_loss"]
    shutil.rmtree(tmp_path / "next")
    _refused(
        train("--init", start, "--n-embd", "16", out="next"), "has n_embd = 8, and n_embd is given as 16"
    )
    shutil.rmtree(tmp_path / "next")
    assert train("--init", start, "--dropout", "0.5", out="next")[0] == 0
    assert checkpoint.load(tmp_path / "next").build_model().config.dropout == 0.5
    shutil.rmtree(tmp_path / "next")
    _refused(train("--init", str(tmp_path / "no"), out="next"), "holds no checkpoint")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "x"], "steps is 'x', expected a whole number"),
        (["--schedule", "cosin"], "did you mean 'cosine'?"),
        (["--learning-rate", "-1"], "learning_rate is -1.0, expected at least 0"),
        (["--n-head", "3"], "n_head"),
        (
            ["--block-size", "5000"],
            "the text has 1800 tokens in this split, expected at least block size + 1",
        ),
        (["--block-size", "300"], "split val: the text has 200 tokens"),
        (["--device", "cuda"], "device is cuda, but this PyTorch sees no GPU"),
        (["--betas", "0.9"], "betas is '0.9', expected two numbers"),
        (["--betas", "0.9,1.5"], "betas is (0.9, 1.5), expected less than 1"),
        (["--mask-share", "2"], "mask_share is 2.0, expected less than 1"),
        (["--dropout", "1"], "dropout is 1.0, expected less than 1"),
    ],
    ids=str,
)
def test_refuses(train, tmp_path, argv, says):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _refused(train(*argv), says)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "n_layers = 2\n", "has an unknown key 'n_layers'; did you mean n_layer?"),
        ("a.toml", "steps = \n", "is not TOML"),
        ("a.yaml", "steps: [\n", "is not YAML"),
        ("a.toml", 'steps = "many"\n', "steps is 'many', expected a whole number"),
        ("a.yaml", "- 1\n", "is a list, expected keys with values"),
    ],
)
def test_refuses_configs(train, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    _refused(train(config=[str(tmp_path / name)]), says)
    _refused(train(config=[str(tmp_path / "missing.toml")]), "cannot be read")


def test_refuses_data(tmp_path, capsys):
    for data, says in (("no", "prepare"), ("", "data is missing; give --data FOLDER")):
        code = cli.main(["train", "--data", data and str(tmp_path / data), "--out", str(tmp_path / "run")])
        _refused((code, "", capsys.readouterr().err), says)


def test_data_may_move(train, data, tmp_path):
    assert train("--steps", "2")[0] == 0
    shutil.copytree(data, tmp_path / "moved")
    assert train("--data", str(tmp_path / "moved"))[0] == 0


def test_refuses_to_go_on_otherwise(train, tmp_path):
    assert train()[0] == 0
    before = checkpoint.read(tmp_path / "run/checkpoints/step-00000004")
    _refused(
        train("--seed", "1"), "a run with seed = 1337, now it is 1; choose another out, or the old value"
    )
    _refused(train("--n-embd", "16"), "n_embd = 8, now it is 16")
    other = small_run.make_data(tmp_path / "other", 1500)
    _refused(train("--data", str(other)), "holds a run on other data")
    assert checkpoint.read(before.folder).state == before.state


def test_damaged_checkpoints(train, tmp_path):
    assert train("--save-every", "2")[0] == 0
    old, new = checkpoint.folders(tmp_path / "run")
    (new / "model.safetensors").write_bytes(b"PK")
    code, out, _ = train("--save-every", "2")
    assert code == 0 and "is damaged and passed over" in out and "goes on after step 2" in out
    for folder in (old, new):
        (folder / "manifest.json").write_text("{}")
    _refused(train(), "all 2 checkpoints in")


def _spoil(monkeypatch, at):
    """Weights become NaN before step `at`."""
    real = Trainer.advance

    def advance(self):
        if self.step == at:
            next(self.model.parameters()).data.fill_(math.nan)
        return real(self)

    monkeypatch.setattr(Trainer, "advance", advance)


def test_a_loss_that_is_not_finite(train, data, tmp_path, monkeypatch):
    _spoil(monkeypatch, 3)
    result = train("--save-every", "2", "--accumulate", "2")
    _refused(result, "loss is nan at step 3", "batches [6, 7]", "windows from token", "step-00000002")
    assert [p.name for p in checkpoint.folders(tmp_path / "run")] == ["step-00000002"]
    shown = result[2].split("windows from token ")[1].split(" on")[0]
    from llmkern.text import Batches

    batches = Batches(Data(data).tokens("train"), 2, 8, 1337, order="epochs")
    assert [int(n) for n in shown.split(", ")] == [*batches.starts(6), *batches.starts(7)]
    monkeypatch.undo()
    assert train("--save-every", "2", "--accumulate", "2")[0] == 0


def test_skipping_what_is_not_finite(train, tmp_path, monkeypatch):
    real = Trainer._backward

    def backward(self):
        loss, tokens = real(self)
        if self.step == 1:
            next(self.model.parameters()).grad.fill_(math.inf)
        return loss, tokens

    monkeypatch.setattr(Trainer, "_backward", backward)
    assert train("--nonfinite", "skip")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines if "loss" in line] == [False, True, False, False]
    assert all(torch.isfinite(t).all() for t in checkpoint.load(tmp_path / "run").model_tensors().values())


def test_a_full_disk(train, tmp_path):
    assert train("--steps", "2", "--schedule", "constant")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints/step-00000002").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # no file may grow beyond
    try:
        result = train("--schedule", "constant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _refused(
        result, "step 4 cannot be written", "File too large", "the last good one is step-00000002, as it was"
    )
    assert {p: p.read_bytes() for p in before} == before
    assert train("--schedule", "constant")[0] == 0
