"""`llmkern generate` on runs, Hugging Face folders and GGUF files."""

import io

import pytest
import torch

from llmkern.cli import main
from llmkern.models import GPT, GPTConfig, save_pretrained
from llmkern.text import BPETokenizer, CharTokenizer
from llmkern.train import checkpoint

TOKENIZER = CharTokenizer("abcdefgh \n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run")
    checkpoint.save(path, 3, GPT(GPTConfig(len(TOKENIZER), 16, 1, 2, 32)), TOKENIZER)
    return path


def _generate(capsys, *argv):
    assert main(["generate", *map(str, argv), "--device", "cpu"]) == 0
    return capsys.readouterr()


def _refused(capsys, *argv):
    assert main(["generate", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("llmkern: ")
    return error


def test_streams_one_text(capsys, run):
    out = _generate(capsys, run, "--prompt", "bad cab", "--max-new-tokens", 40)
    assert out.out.startswith("bad cab") and len(out.out) == 7 + 40 + 1
    assert out.err.startswith("40 tokens in ")
    assert _generate(capsys, run, "--prompt", "bad cab", "--max-new-tokens", 40).out == out.out
    assert _generate(capsys, run, "--prompt", "bad cab", "--seed", 1).out != out.out


def test_several_texts(capsys, run):
    """Text i of a batch is text 1 of the seed i further on, whatever stands beside it."""
    together = _generate(
        capsys, run, "--prompt", "bad", "--prompt", "a", "--samples", 2, "--max-new-tokens", 9, "--seed", 5
    ).out
    texts = together.split("--- ")[1:]
    assert [text.split("\n", 1)[0] for text in texts] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    alone = _generate(capsys, run, "--prompt", "a", "--max-new-tokens", 9, "--seed", 7).out
    assert texts[2].split("\n", 1)[1] == alone


def test_prompts_from_files(capsys, run, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("face\n")
    expected = _generate(capsys, run, "--prompt", "face\n").out
    assert _generate(capsys, run, "--prompt-file", tmp_path / "prompt.txt").out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("face\n"))
    assert _generate(capsys, run, "--prompt-file", "-").out == expected
    assert len(_generate(capsys, run).out) == 201  # begins after a line break, which is not shown


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised(capsys, run, bits):
    assert _generate(capsys, run, "--quantize", bits, "--prompt", "a", "--max-new-tokens", 5).out


def test_options(capsys, run):
    greedy = _generate(capsys, run, "--prompt", "a", "--temperature", 0).out
    assert _generate(capsys, run, "--prompt", "a", "--top-k", 1).out == greedy
    assert _generate(capsys, run, "--prompt", "a", "--top-p", 1e-9).out == greedy
    stop = greedy[4:6]
    assert _generate(capsys, run, "--prompt", "a", "--temperature", 0, "--stop", stop).out == (
        "a" + greedy[1 : greedy.index(stop, 1)] + "\n"
    )
    assert (
        _generate(capsys, run, "--prompt", "a", "--repetition-penalty", 5, "--temperature", 0).out != greedy
    )


def test_hugging_face_folder(capsys, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["the cat sat on the mat"], 270)
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, 32, 1, 2, 32))  # a padded vocabulary
    save_pretrained(model, tmp_path)
    assert "no tokenizer.json; give the model's with --tokenizer" in _refused(capsys, tmp_path)
    tokenizer.save(tmp_path)
    out = _generate(capsys, tmp_path, "--prompt", "the cat", "--ignore-end", "--max-new-tokens", 30)
    assert out.out.startswith("the cat") and out.err.startswith("30 tokens")
    assert _generate(capsys, tmp_path, "--dtype", "bfloat16", "--max-new-tokens", 3).out
    with torch.no_grad():  # the end of the text is likeliest
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[tokenizer.end_of_text])
    save_pretrained(model, tmp_path)
    ended = _generate(capsys, tmp_path, "--prompt", "the cat", "--temperature", 0)
    assert ended.out == "the cat\n" and ended.err.startswith("0 tokens")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (("--prompt", "zebra"), "character 'z' at position 0 is not in the vocabulary"),
        (("--prompt", "a" * 17), "the prompt has 17 tokens, expected at most 16, what the model can see"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--samples", "0"), "--samples is 0, expected 1 or more"),
        (("--max-new-tokens", "-5"), "max_new_tokens is -5"),
        (("--prompt-file", "nowhere.txt"), "'nowhere.txt' cannot be read"),
        (("--tokenizer", "nowhere.json"), "tokenizer 'nowhere.json' cannot be read"),
        (("--device", "cuda"), "this PyTorch sees no GPU"),
    ],
)
def test_refuses(capsys, run, argv, match):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert match in _refused(capsys, run, *argv)


def test_refuses_checkpoints(capsys, run, tmp_path):
    assert "does not exist; expected a run's folder" in _refused(capsys, tmp_path / "nowhere")
    assert "holds no checkpoint" in _refused(capsys, tmp_path)
    (tmp_path / "model.pt").touch()
    assert "is a file, expected a folder, or a file that ends in .gguf" in _refused(
        capsys, tmp_path / "model.pt"
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "expected a header of 24" in _refused(capsys, tmp_path / "x.gguf")
    CharTokenizer(map(chr, range(99))).save(tmp_path)
    assert "has 99 tokens, expected at most 10" in _refused(capsys, run, "--tokenizer", tmp_path)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "odd", 1, GPT(GPTConfig(len(TOKENIZER), 16, 1, 2, 20)), TOKENIZER)
    assert "int4 is not possible: lm_head cannot be quantised" in _refused(
        capsys, tmp_path / "odd", "--quantize", "int4"
    )
