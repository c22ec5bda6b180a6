"""The `llmkern` command: what it prints, saves and refuses."""

import json
import subprocess
import sys

import pytest
import torch

import llmkern
from llmkern import demo
from llmkern.cli import main
from llmkern.ops import OPS


@pytest.fixture(autouse=True)
def _short_sample(monkeypatch):
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 10)


def _refused(capsys, *argv):
    """Exit code 2 and one line on stderr, which is returned."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("llmkern"), error
    return error


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"llmkern {llmkern.__version__}\n"


def test_python_m_llmkern():
    command = [sys.executable, "-m", "llmkern", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"llmkern {llmkern.__version__}\n"


def test_info_lists_every_op(capsys):
    assert main(["info", "--ops"]) == 0
    out = capsys.readouterr().out
    for op in OPS.values():
        assert op.name in out and op.formula() in out and op.source in out
    for word in ("torch", "triton", "python", "processor", "C++ kernels", "GPU"):
        assert word in out


def test_info_says_how_to_get_missing_kernels(capsys, monkeypatch):
    monkeypatch.setattr(llmkern._cpu, "load", lambda isa: f"not built for {isa}; install a compiler")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "C++ kernels  none: not built" in out and "install a compiler" in out


def test_demo(capsys, tmp_path):
    argv = ["demo", "--data", "python-docs", "--preset", "nano", "--steps", "3", "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "corpus    python-docs" in out and "tokens/s" in out and "The swapped model writes:" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert len(numbers["plain"]["loss"]) == len(numbers["swapped"]["loss"]) == 3
    assert numbers["largest_loss_difference"] < demo.AGREE_WITHIN
    assert {half.rpartition("_")[0] for half in numbers["kernels"]} <= set(OPS)


def test_demo_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmkern.plots", None)
    argv = ["demo", "--data", "python-docs", "--preset", "nano", "--steps", "1", "--out", str(tmp_path)]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert "pip install llmkern[plot]" in capsys.readouterr().out
    assert not (tmp_path / "demo.png").exists()


def test_demo_stops_in_time(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_SECONDS", 0)
    assert (
        main(["demo", "--data", "python-docs", "--preset", "nano", "--out", str(tmp_path), "--no-plot"]) == 0
    )
    assert "Stopped after 1 steps" in capsys.readouterr().out


def test_demo_fails_when_the_losses_part(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "AGREE_WITHIN", -1.0)
    argv = ["demo", "--data", "python-docs", "--preset", "nano", "--steps", "1", "--out", str(tmp_path)]
    assert main([*argv, "--no-plot"]) == 1
    assert "FAILED: the losses differ" in capsys.readouterr().out


def test_bad_options(capsys):
    assert "--steps: '0' is not" in _refused(capsys, "demo", "--steps", 0)
    assert "invalid choice: 'huge'" in _refused(capsys, "demo", "--preset", "huge")
    assert "invalid choice: 'trian'" in _refused(capsys, "trian")
    assert "COMMAND" in _refused(capsys)


def test_bad_files(capsys, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "does not exist" in _refused(capsys, "demo", "--data", tmp_path / "none.txt", *out)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "expected at least block size + 1" in _refused(capsys, "demo", "--data", short, *out)
    assert "--out" in _refused(capsys, "demo", "--out", short / "below")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert "sees no GPU" in _refused(capsys, "demo", "--device", "cuda")
