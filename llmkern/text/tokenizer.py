"""Tokenizers: characters."""

import torch
from torch import Tensor

from ..errors import UserError


class CharTokenizer:
    """One token for each character of a vocabulary.

    Args:
        text: its distinct characters, sorted, become tokens 0, 1, 2, ...
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise UserError("the text is empty, so it has no vocabulary; expected at least one character")
        self.vocabulary = "".join(sorted(set(text)))
        self._tokens = {character: token for token, character in enumerate(self.vocabulary)}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Tokens of `text`, (len(text),) int64.

        Raises:
            UserError: a character that is not in the vocabulary.
        """
        try:
            return torch.tensor([self._tokens[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"character {character!r} at position {text.index(character)} is not in the vocabulary "
                f"of {len(self)} characters; train with a text that has it, or leave it out"
            ) from None

    def decode(self, tokens: Tensor) -> str:
        """The text of `tokens`, an integer tensor of shape (n,)."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())
