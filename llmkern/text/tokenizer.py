"""Tokenizers with one interface: characters, bytes, and in `bpe.py` what the library `tokenizers` knows.

    tokenizer = load_tokenizer("data/shakespeare")  # whatever kind was saved there
    tokenizer.decode(tokenizer.encode("To be")) == "To be"

Special tokens come after the vocabulary, so adding one leaves all others as they are.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

FILE_NAME = "tokenizer.json"
END_OF_TEXT, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        kind: "char", "byte" or "bpe".
    """

    kind: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens, special ones included."""

    @property
    @abstractmethod
    def special(self) -> dict[str, int]:
        """Name -> token of every special token; text never becomes one."""

    @abstractmethod
    def add_special(self, name: str) -> int:
        """The special token called `name`, added at the end if it is new."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Tokens of `text`, (n,) of an integer dtype."""

    @abstractmethod
    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of (n,) tokens; special ones by their names."""

    @abstractmethod
    def to_json(self) -> str:
        """All that it is; `from_json` of its class reads it."""

    def encode(self, text: str) -> Tensor:
        """Tokens of `text`, (n,) int64.

        Raises:
            UserError: text that this vocabulary has no tokens for.
        """
        return torch.from_numpy(self.encode_array(text).astype(np.int64))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each; in parallel where the kind can."""
        return [self.encode_array(text) for text in texts]

    @property
    def end_of_text(self) -> int | None:
        """The token between documents, or None if it has none."""
        return self.special.get(END_OF_TEXT)

    def sha256(self) -> str:
        """Equal for tokenizers that give equal tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> Path:
        """Write it to the file `path`, or into the folder `path` as tokenizer.json; returns the file."""
        path = _file(path)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


class _Listed(Tokenizer):
    """A vocabulary of a fixed size, then the special tokens in the order in which they were added."""

    def __init__(self, size: int, special: Iterable[str]) -> None:
        self._size = size
        self._special: dict[str, int] = {}
        for name in special:
            self.add_special(name)

    def __len__(self) -> int:
        return self._size + len(self._special)

    @property
    def special(self) -> dict[str, int]:
        return dict(self._special)

    def add_special(self, name: str) -> int:
        return self._special.setdefault(name, len(self))

    def _name(self, token: int) -> str:
        if not self._size <= token < len(self):
            raise UserError(f"token {token} is not in the vocabulary of {len(self)}; decode what it encoded")
        return list(self._special)[token - self._size]


class CharTokenizer(_Listed):
    """One token for each character of a vocabulary.

    Args:
        text: its distinct characters, sorted, become tokens 0, 1, 2, ...
        special: names of special tokens.
    """

    kind = "char"

    def __init__(self, text: str | Iterable[str], special: Iterable[str] = ()) -> None:
        characters = sorted(set(text))
        if not characters:
            raise UserError("the text is empty, so it has no vocabulary; expected at least one character")
        self.vocabulary = "".join(characters)
        self._codes = _code_points(self.vocabulary)  # ascending
        super().__init__(len(characters), special)

    def encode_array(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        tokens = np.searchsorted(self._codes, codes).clip(max=self._size - 1)
        strangers = np.flatnonzero(self._codes[tokens] != codes)
        if len(strangers):
            raise UserError(
                f"character {text[strangers[0]]!r} at position {strangers[0]} is not in the vocabulary "
                f"of {self._size} characters; train with a text that has it, or leave it out"
            )
        return tokens

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        return "".join(self.vocabulary[t] if 0 <= t < self._size else self._name(t) for t in integers(tokens))

    def to_json(self) -> str:
        return json.dumps(
            {"kind": self.kind, "vocabulary": self.vocabulary, "special": list(self._special)},
            ensure_ascii=True,  # also lone surrogates
        )

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        fields = json.loads(text)
        return cls(fields["vocabulary"], fields["special"])


class ByteTokenizer(_Listed):
    """One token for each of the 256 bytes of UTF-8: any text can be encoded, and nothing is trained."""

    kind = "byte"

    def __init__(self, special: Iterable[str] = ()) -> None:
        super().__init__(256, special)

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """As the base; bytes that are no UTF-8 become U+FFFD."""
        pieces = (bytes([t]) if 0 <= t < 256 else self._name(t).encode() for t in integers(tokens))
        return b"".join(pieces).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "special": list(self._special)})

    @classmethod
    def from_json(cls, text: str) -> "ByteTokenizer":
        return cls(json.loads(text)["special"])


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in the file `path`, or in tokenizer.json of the folder `path`, of any kind.

    Files of the Hugging Face library `tokenizers` are read as they are.

    Raises:
        UserError: no such file, or not a tokenizer.
    """
    from .bpe import BPETokenizer  # which imports this file

    path = _file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read ({error}); expected {FILE_NAME}") from None
    try:
        kind = json.loads(text).get("kind", "bpe")  # the library's own files name none
        return {k.kind: k for k in (CharTokenizer, ByteTokenizer, BPETokenizer)}[kind].from_json(text)
    except UserError:
        raise
    except Exception as error:  # the library, in Rust, raises plain Exception
        raise UserError(
            f"tokenizer {str(path)!r} is not one ({type(error).__name__}: {error}); expected a file that "
            "llmkern or the Hugging Face library tokenizers wrote"
        ) from None


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def integers(tokens: Tensor | Sequence[int]) -> list[int]:
    """(n,) tokens as Python's integers."""
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
