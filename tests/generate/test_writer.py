"""Tokens to text while they come."""

import pytest

from llmkern.generate import Writer
from llmkern.text import BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "Zoë: naïve café, 世界! 🙂 fin"


def _tokenizers():
    yield CharTokenizer(TEXT)
    yield ByteTokenizer()
    pytest.importorskip("tokenizers")
    yield BPETokenizer.train([TEXT, "the naïve café"], 270)


def _pieces(writer, tokens):
    return [*(writer.add(token) for token in tokens), writer.end()]


def test_whole_characters():
    for tokenizer in _tokenizers():
        writer = Writer(tokenizer)
        pieces = _pieces(writer, tokenizer.encode(TEXT).tolist())
        assert "".join(pieces) == writer.text == TEXT
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum(map(bool, pieces)) > 5  # it does stream


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = ByteTokenizer()
    assert _pieces(Writer(tokenizer), tokenizer.encode("aé").tolist()[:2]) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["!"], "Zoë: naïve café, 世界"),
        ([" café, 世"], "Zoë: naïve"),
        (["café?", "zzz"], TEXT),
        (["世", "naï"], "Zoë: "),
        (["Z"], ""),
        (["fin"], TEXT[:-3]),
        (["fin!"], TEXT),
        ([""], TEXT),
    ],
)
def test_stop_strings(stops, expected):
    for tokenizer in _tokenizers():
        writer = Writer(tokenizer, stops)
        assert "".join(_pieces(writer, tokenizer.encode(TEXT).tolist())) == expected == writer.text
        assert writer.stopped == (expected != TEXT)


def test_what_may_become_a_stop_is_held_back():
    tokenizer = CharTokenizer("abc")
    writer = Writer(tokenizer, ["abac"])
    assert [writer.add(t) for t in tokenizer.encode("cababac").tolist()] == ["c", "", "", "", "ab", "", ""]
    assert writer.stopped and writer.text == "cab"
