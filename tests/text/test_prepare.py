"""`llmkern data prepare`: what becomes of documents, and what it says of those it cannot read."""

import json

import numpy as np
import pytest

from llmkern import cli, durable
from llmkern.errors import UserError
from llmkern.text.bpe import BPETokenizer
from llmkern.text.clean import Filter, normalise
from llmkern.text.prepare import Options, prepare
from llmkern.text.shards import Data
from llmkern.text.sources import Sources
from llmkern.text.tokenizer import END_OF_TEXT

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def _text(number: int, words: int = 60) -> str:
    chance = np.random.default_rng(number)
    return " ".join(chance.choice(WORDS, words)) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Ten documents of three formats, one of them twice, one nearly twice, one blank."""
    import pyarrow
    from pyarrow.parquet import write_table

    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    for i in range(4):
        (source / f"{i}.txt").write_text(_text(i))
    (source / "again.md").write_text(_text(0))
    (source / "below/nearly.txt").write_text(_text(1) + "and one more sentence\n")
    (source / "blank.txt").write_text(" \n")
    lines = [json.dumps({"text": _text(i), "id": i}) for i in (10, 11)]
    (source / "lines.jsonl").write_text("\n".join([*lines, ""]))
    write_table(pyarrow.table({"text": [_text(20), None, _text(21)]}), source / "table.parquet")
    return source


def _documents(path, split):
    data = Data(path)
    tokens = data.tokens(split).windows(np.zeros(1, np.int64), len(data.tokens(split)))[0]
    return data.tokenizer.decode(tokens).split(END_OF_TEXT)[:-1]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_documents_are_cleaned_split_and_tokenised(folder, tmp_path, tokenizer):
    manifest = prepare(Sources([str(folder)]), tmp_path / "data", Options(tokenizer, vocab_size=300))
    assert manifest["documents"] == 11
    assert manifest["dropped"] == {"duplicate": 1, "near-duplicate": 1, "blank": 1}
    kept = {split: _documents(tmp_path / "data", split) for split in ("train", "val")}
    assert len(kept["train"]) == 7 and len(kept["val"]) == 1
    assert {_text(i) for i in (0, 2, 3, 10, 11, 20, 21)} < {*kept["train"], *kept["val"]}
    counts = manifest["splits"]["train"]
    assert counts["characters"] == counts["bytes"] == sum(map(len, kept["train"]))
    assert manifest["tokenizer"]["sha256"] == Data(tmp_path / "data").tokenizer.sha256()


def test_the_split_belongs_to_the_documents(folder, tmp_path):
    """Other names and another order of the same documents give the same split."""
    prepare(Sources([str(folder)]), tmp_path / "one", Options(val=0.4))
    (folder / "2.txt").rename(folder / "below/zzz.txt")
    prepare(Sources([str(folder)]), tmp_path / "two", Options(val=0.4))
    assert sorted(_documents(tmp_path / "one", "val")) == sorted(_documents(tmp_path / "two", "val"))
    prepare(Sources([str(folder)]), tmp_path / "three", Options(val=0.4, seed=1))
    assert sorted(_documents(tmp_path / "one", "val")) != sorted(_documents(tmp_path / "three", "val"))


def test_held_out_documents_teach_the_tokenizer_nothing(folder, tmp_path):
    prepare(Sources([str(folder)]), tmp_path / "data", Options("bpe", vocab_size=300, val=0.5))
    data = Data(tmp_path / "data")
    learned = BPETokenizer.train(_documents(tmp_path / "data", "train"), 300)
    learned.add_special(END_OF_TEXT)
    assert learned.sha256() == data.tokenizer.sha256()


def test_workers_and_runs_give_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkern.text.prepare.CHUNK", 500)
    for workers in (1, 3):
        prepare(Sources([str(folder)]), tmp_path / str(workers), Options(workers=workers))
    first, second = ((tmp_path / n / "manifest.json").read_text() for n in ("1", "3"))
    assert json.loads(first)["files"] == json.loads(second)["files"]


def test_one_document_is_split_by_position(tmp_path):
    (tmp_path / "one.txt").write_text("abc" * 100)
    manifest = prepare(Sources([str(tmp_path / "one.txt")]), tmp_path / "data", Options(val=0.2))
    assert manifest["split"] == "by position" and END_OF_TEXT not in Data(tmp_path / "data").tokenizer.special
    assert {name: split["tokens"] for name, split in manifest["splits"].items()} == {"train": 240, "val": 60}


def test_normalise_and_filter():
    assert normalise("\ufeffe\u0301\r\nx\ry\0") == "é\nx\ny"
    rules = Filter(min_characters=5, max_repeated_lines=0.3, min_letters=0.5)
    assert [rules.why_not(text) for text in ("  ", "abc", "one\none\n", "12345 a", "one\ntwo\n")] == [
        "blank", "too short", "repeated lines", "too few letters", None,
    ]  # fmt: skip


def test_a_flipped_bit_in_the_data_is_found(folder, tmp_path):
    prepare(Sources([str(folder)]), tmp_path / "data", Options())
    shard = next((tmp_path / "data").glob("train-*.bin"))
    whole = bytearray(shard.read_bytes())
    whole[7] ^= 1
    shard.unlink()
    shard.write_bytes(whole)
    with pytest.raises(UserError, match="sha256"):
        Data(tmp_path / "data")
    assert cli.main(["data", "verify", str(tmp_path / "data")]) == 2


def _write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "argv", "says"),
    [
        ("empty.txt", b"", [], "no document is left to train on (1 blank)"),
        ("one.txt", b"aaaa", [], "the text has one distinct character, 'a'"),
        ("latin.txt", "déjà vu".encode("latin-1"), [], "is not utf-8 (byte 0xe9 at position 1)"),
        ("a.jsonl", b'{"text": "x"\n', [], "a.jsonl:1' is not JSON"),
        ("a.jsonl", b'{"body": "xy"}\n', [], "has no text 'text' (it has body); name it with --field"),
        ("a.parquet", b"PAR1 no", [], "is not Parquet"),
        ("a.txt", b"abc", ["--val", "1.5"], "val is 1.5, expected a share from 0 to below 1"),
        ("a.txt", b"abc", ["--tokenizer", "bpw"], "tokenizer is 'bpw', expected char, byte, bpe"),
        ("a.txt", b"abc", ["--tokenizer", "bpe", "--vocab-size", "9"], "expected at least 257"),
        ("a.txt", b"abc", ["--min-characters", "9"], "no document is left to train on (1 too short)"),
        ("a.txt", b"abc", ["--encoding", "utf8x"], "encoding"),
        ("a.txt", b"abc", ["--workers", "-1"], "workers"),
        ("a.txt", b"abc", ["--near-duplicates", "7"], "near"),
        ("a.txt", b"abc", ["--seperator", "x"], "--seperator is unknown; did you mean --separator?"),
    ],
)
def test_refuses(tmp_path, capsys, name, content, argv, says):
    path = _write(tmp_path, name, content)
    _refuse(capsys, ["data", "prepare", path, "--out", str(tmp_path / "data"), *argv], says)
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob(".*"))


def _refuse(capsys, argv, says):
    """The command says one sentence, and ends with exit code 2."""
    try:
        code = cli.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and says in said and said.count("\n") == 1, said


def test_refuses_folders(tmp_path, capsys):
    _refuse(capsys, ["data", "prepare", str(tmp_path / "no"), "--out", str(tmp_path / "d")], "does not exist")
    (tmp_path / "here").mkdir()
    argv = ["data", "prepare", str(tmp_path / "here"), "--out", str(tmp_path / "d")]
    _refuse(capsys, argv, "has no file that is known")
    _refuse(capsys, [*argv[:-1], str(tmp_path / "here")], "is there already; choose another, or --force")
    _refuse(capsys, ["data", "verify", str(tmp_path / "here")], "prepare")


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        prepare(Sources([str(folder)]), tmp_path / "data", Options())
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
