"""Documents as one long sequence of tokens, in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .sources import Sources
from .tokenizer import Tokenizer


def join(names: Sequence[str], tokenizer: Tokenizer, field: str = "text") -> Tensor:
    """(n,) tokens of all documents, each with the end-of-text token behind it, if there is one.

    Args:
        names, field: as `Sources` takes them.
        tokenizer: the model's.

    Raises:
        UserError: sources that are missing, or have no text; text that the tokenizer cannot encode.
    """
    end = torch.tensor([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=torch.int64)
    pieces = [piece for text in Sources(names, field) for piece in (tokenizer.encode(text), end)]
    tokens = torch.cat(pieces) if pieces else end
    if len(tokens) < 2:
        raise UserError(f"{', '.join(names)} has {len(tokens)} tokens, expected a text of at least 2")
    return tokens
