"""What generation asks of a model: take a prompt, then one token after another."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError


class Engine(Protocol):
    """Runs up to `batch` sequences, each in its row, and keeps what they have seen.

    Attributes:
        batch: rows.
        max_length: the most tokens that a row can see.
    """

    batch: int
    max_length: int

    def prefill(self, tokens: Tensor, row: int = 0) -> Tensor:
        """Forget the row, and take (T,) tokens in one go; returns (V,) logits of the next one."""

    def step(self, tokens: Tensor) -> Tensor:
        """Take one more token in each of the first n rows, (n,); returns (n, V) logits of the next ones."""

    def move(self, source: int, target: int) -> None:
        """Let row `target` be what row `source` is, which is used no more."""


class ModelEngine:
    """An `Engine` of any of our causal models, with a `KVCache` for each of its layers.

    Args:
        model: in `eval` mode.
        batch: rows.
        max_length: the most tokens that a row can see; None is the model's context.
        vocab_size: logits of later tokens, with which vocabularies are padded, are cut off; None is all.
        cache_dtype: of keys and values, also torch.int8; None is the model's.

    Raises:
        UserError: a model that cannot generate.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int = 1,
        max_length: int | None = None,
        vocab_size: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(model, "new_caches"):
            raise UserError(
                f"a {type(model).__name__} cannot generate text, expected a causal language model"
            )
        context = model.config.block_size
        self.model, self.batch, self.vocab_size = model, batch, vocab_size
        self.max_length = context if max_length is None else min(max_length, context)
        if self.max_length < 2:
            raise UserError(f"the model can see {self.max_length} tokens, expected at least 2 to generate")
        self.device = next(model.parameters()).device
        options = {} if cache_dtype is None else {"dtype": cache_dtype}
        self.caches = model.new_caches(batch, self.max_length, **options)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, row: int = 0) -> Tensor:
        caches = self.caches.rows(row, row + 1)
        for cache in caches:
            cache.reset()
        return self._logits(tokens[None], caches)[0]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens[:, None], self.caches.rows(0, len(tokens)))

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        for cache in self.caches:
            cache.move_row(source, target)

    def _logits(self, idx: Tensor, caches: list) -> Tensor:
        return self.model.next_logits(idx.to(self.device), caches)[:, : self.vocab_size]
