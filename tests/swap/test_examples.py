"""Every example runs, at a small size, and shows what it says."""

import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog, and nobody minds. " * 40


@pytest.fixture
def example(monkeypatch, silent):
    """import_(name) of an example as a script would be found: its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: __import__(name)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path) -> list[str]:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return ["--data", str(file), "--steps", "3", "--batch-size", "2"]


def test_article(example, data, capsys):
    sizes = [
        "--seq-length",
        "8",
        "--embed-dim",
        "16",
        "--num-heads",
        "2",
        "--hidden-dim",
        "24",
        "--num-layers",
        "2",
    ]
    result = example("article").main([*data, *sizes])
    assert result.apart < 1e-5 and len(result.losses) == 3
    assert "llmkern.nn.TransformerEncoderLayer" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--no-flash"], ["--compile"], ["--compile", "--no-flash"]])
def test_nanogpt(example, data, capsys, options):
    sizes = ["--block-size", "8", "--n-embd", "16", "--n-head", "2", "--n-layer", "1"]
    result = example("nanogpt").main([*data, *sizes, *options])
    out = capsys.readouterr().out
    assert result.apart < 1e-5
    shown = ["cross_entropy", "layer_norm", "ffn" if "--compile" in options else "FFNKernel"]
    if options != ["--no-flash"]:  # written out, only the compiler sees it
        shown.append("llmkern.ops.attention" if "--no-flash" in options else "scaled_dot_product_attention")
    assert all(word in out for word in shown), out


def weights(name: str) -> str:
    """A folder that the user has put weights in."""
    pytest.importorskip("transformers")
    folder = os.environ.get(f"LLMKERN_{name}")
    if not folder:
        pytest.skip(f"LLMKERN_{name} does not name the folder of its weights: see the top of the example")
    return folder


def test_smollm2(example):
    pytest.importorskip("gguf")
    options = ["--tokens", "6", "--length", "16", "--rounds", "1"]
    result = example("smollm2").main([weights("SMOLLM2"), *options])
    assert result.same_text and result.same_loss < 1e-5 and set(result.speedups) >= {"generate", "prefill"}


def test_minilm(example):
    result = example("minilm").main([weights("MINILM"), "--batch", "2", "--rounds", "1"])
    assert result.apart < 1e-5 and result.nearest == "Someone eats a meal."


def test_python_docs(example, tmp_path, monkeypatch, capsys):
    module, library = example("python_docs"), tmp_path / "library"
    (library / "email").mkdir(parents=True)
    (library / "email/parser.py").write_text(f'"""{TEXT[:90]}"""\n')
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(sys, "argv", ["python_docs.py", str(tmp_path / "session")])
    module.main()
    assert (tmp_path / "session/texts/email.parser.txt").read_text() == TEXT[:90].strip() + "\n"
    assert (tmp_path / "session/topics.csv").read_text().splitlines()[1].endswith(",mail")
    assert "1 docstrings with topics" in capsys.readouterr().out


def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    here = Path(__file__).read_text()
    assert all(f'example("{name}")' in here for name in scripts)
