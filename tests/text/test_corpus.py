"""Corpora, tokenizer, batches."""

import hashlib
import io

import pytest
import torch

from llmkern import text
from llmkern.errors import UserError
from llmkern.text import corpus


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMKERN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_shakespeare(monkeypatch):
    """A short stand-in for Tiny Shakespeare with the checksum to match."""
    data = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(corpus, "SHAKESPEARE_BYTES", len(data))
    return data


def _serve(monkeypatch, data):
    """Let downloads give `data`, or fail as without a network if it is None."""

    def urlopen(url, timeout):
        if data is None:
            raise OSError("no network")
        return io.BytesIO(data)

    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)


@pytest.mark.parametrize("name", corpus.FILE_NAMES)
def test_shakespeare_from_data_folder_or_file(monkeypatch, tmp_path, small_shakespeare, name):
    path = tmp_path / name
    path.write_bytes(small_shakespeare)
    _serve(monkeypatch, None)
    for given in (tmp_path, path):
        monkeypatch.setenv("LLMKERN_DATA", str(given))
        assert text.load("shakespeare") == ("shakespeare", small_shakespeare.decode(), str(path))


def test_download_goes_to_the_cache_once(monkeypatch, tmp_path, small_shakespeare):
    _serve(monkeypatch, small_shakespeare)
    first = text.load("shakespeare")
    _serve(monkeypatch, None)
    assert text.load("shakespeare") == first
    assert [p.name for p in (tmp_path / "cache/llmkern").iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize(
    "change", [lambda data: data + b"x" * 9999, lambda data: data[:-1], lambda data: b""]
)
def test_wrong_download_is_refused_and_not_kept(monkeypatch, tmp_path, small_shakespeare, change):
    _serve(monkeypatch, change(small_shakespeare))
    with pytest.raises(UserError, match="wrong checksum"):
        text.load("shakespeare")
    assert not (tmp_path / "cache").exists()


def test_corrupt_cache_is_downloaded_again(monkeypatch, small_shakespeare):
    path = corpus.cache_folder() / "tinyshakespeare.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of")
    _serve(monkeypatch, small_shakespeare)
    assert text.load("shakespeare").text == small_shakespeare.decode()
    assert path.read_bytes() == small_shakespeare


def test_without_network(monkeypatch):
    _serve(monkeypatch, None)
    with pytest.raises(UserError, match=r"cannot be downloaded .no network.*LLMKERN_DATA"):
        text.load("shakespeare")
    found = text.load()
    assert found.name == "python-docs"
    assert "because Tiny Shakespeare cannot be downloaded" in found.origin


def test_python_docs():
    found = text.load("python-docs")
    assert len(found.text) > 100_000
    assert found == text.load("python-docs")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"abc\xff", r"not UTF-8 \(byte 0xff at position 3\)"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        text.load(path)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        text.load(tmp_path)


def test_bad_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMKERN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="which does not exist"):
        text.load()
    (tmp_path / "input.txt").write_text("another text")
    monkeypatch.setenv("LLMKERN_DATA", str(tmp_path))
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        text.load()


def test_tokenizer_round_trip():
    sentence = "naïve π, 東京\n\ttwice: naïve"
    tokenizer = text.CharTokenizer(sentence)
    tokens = tokenizer.encode(sentence)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(sentence),)
    assert tokenizer.decode(tokens) == sentence
    assert list(tokenizer.vocabulary) == sorted(set(sentence)) and len(tokenizer) == len(set(sentence))


def test_tokenizer_errors():
    with pytest.raises(UserError, match="'z' at position 2"):
        text.CharTokenizer("abc").encode("abz")
    with pytest.raises(UserError, match="empty"):
        text.CharTokenizer("")


def test_split():
    train, validation = text.split(torch.arange(100))
    assert train.tolist() == list(range(90)) and validation.tolist() == list(range(90, 100))


def test_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    batches, again = (text.Batches(tokens, 4, 16, seed=3) for _ in range(2))
    later = [batches[step] for step in (5, 0)]
    for step, (inputs, targets) in zip((5, 0), later):
        assert inputs.shape == targets.shape == (4, 16)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, again[step][0])
    assert not torch.equal(later[0][0], later[1][0])
    assert not torch.equal(batches[0][0], text.Batches(tokens, 4, 16, seed=4)[0][0])


def test_batches_reach_both_ends():
    starts = torch.cat([text.Batches(torch.arange(6), 32, 4, seed=0)[step][0][:, 0] for step in range(4)])
    assert set(starts.tolist()) == {0, 1}


def test_batches_refuse_what_does_not_fit():
    assert text.Batches(torch.arange(17), 1, 16)[0][0].tolist() == [list(range(16))]
    with pytest.raises(UserError, match="16 tokens in this split, expected at least block size \\+ 1 = 17"):
        text.Batches(torch.arange(16), 1, 16)
    with pytest.raises(UserError, match="seed is -1"):
        text.Batches(torch.arange(17), 1, 16, seed=-1)
