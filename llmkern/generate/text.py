"""Prompts of text in, texts out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..text import Tokenizer
from .engine import Engine
from .loop import generate
from .sampling import UNCHANGED, Sampling
from .writer import Writer


class Completion(NamedTuple):
    """What was written after a prompt.

    Attributes:
        text: without the prompt.
        tokens: how many were written.
        finish: "stop" or "length".
    """

    text: str
    tokens: int
    finish: str


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = UNCHANGED,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    ignore_end: bool = False,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """What the model writes after each prompt.

    Args:
        engine, max_new_tokens, sampling, seed: as `generate`'s.
        tokenizer: the model's.
        prompts: an empty one stands for the beginning of a text.
        stop: strings that end a text, and are not part of it.
        ignore_end: go on after the tokenizer's end-of-text token.
        on_text: called with a prompt's number and its new text, as soon as that is certain.

    Returns:
        A Completion for each prompt.

    Raises:
        UserError: as `generate`, and characters that the tokenizer has no tokens for.
    """
    writers = [Writer(tokenizer, stop) for _ in prompts]

    def tell(i: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(i, piece)

    def on_token(i: int, token: int) -> bool:
        tell(i, writers[i].add(token))
        return writers[i].stopped

    end = tokenizer.end_of_text
    outputs = generate(
        engine,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens,
        sampling,
        seed=seed,
        stop_tokens=() if end is None or ignore_end else (end,),
        on_token=on_token,
    )
    for i, writer in enumerate(writers):
        tell(i, writer.end())
    return [Completion(w.text, len(o.tokens), o.finish) for w, o in zip(writers, outputs)]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(T,) tokens of a prompt; an empty one is the token between texts, or a line break where there is none.

    Raises:
        UserError: an empty prompt to a tokenizer that has neither.
    """
    if prompt:
        return tokenizer.encode(prompt)
    if tokenizer.end_of_text is not None:
        return torch.tensor([tokenizer.end_of_text])
    try:
        return tokenizer.encode("\n")
    except UserError:
        raise UserError(
            "the prompt is empty, and this tokenizer has nothing to begin with; give one"
        ) from None
