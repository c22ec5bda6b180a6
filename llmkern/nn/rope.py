"""RotaryEmbedding: the tables of a rotary position embedding, and the rotation by them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions.

    The tables are buffers outside of the state_dict.  They stay float32 when the model is cast, and
    grow when a sequence is longer than they are.

    Args:
        dim: how many elements of a head are rotated; even.
        max_position_embeddings: the context that the model was made for, in tokens.
        base: theta of the frequencies.
        interleaved: pairs are elements (2i, 2i + 1), as in RoFormer and GPT-J; else (i, i + dim / 2), as
            in Hugging Face's Llama.
        scaling: as `rope_scaling` of a Hugging Face config; see `llmkern.ops.rope_frequencies`.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864.
    """

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.max_position_embeddings, self.base = dim, max_position_embeddings, base
        self.interleaved, self.scaling = interleaved, scaling
        cos, sin = self._tables(max_position_embeddings, torch.get_default_device())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, query: Tensor, key: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate query and key.

        Args:
            query: (batch, heads, length, head dim).
            key: (batch, key heads, length, head dim) or None.
            position_ids: (length,) or (batch, length) int64, below max_position_embeddings; None is
                0, 1, 2, ...

        Returns:
            The rotated query and key, or the query alone without a key.
        """
        if position_ids is None and query.shape[2] > self.cos.shape[0]:
            self.cos, self.sin = self._tables(query.shape[2], self.cos.device)
        return ops.rope(
            query, key, self.cos, self.sin, interleaved=self.interleaved, position_ids=position_ids
        )

    def extra_repr(self) -> str:
        """What is shown between the parentheses."""
        return (
            f"{self.dim}, max_position_embeddings={self.max_position_embeddings}, base={self.base}, "
            f"interleaved={self.interleaved}, scaling={self.scaling}"
        )

    def _tables(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return ops.rope_table(
            positions, self.dim, self.base, self.scaling,
            max_position_embeddings=self.max_position_embeddings, device=device,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Made again, not moved: `.to(bfloat16)` leaves them float32, `.to_empty` leaves them right."""
        super()._apply(fn, recurse)
        self.cos, self.sin = self._tables(self.cos.shape[0], self.cos.device)
        return self
