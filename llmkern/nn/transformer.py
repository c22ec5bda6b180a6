"""Transformer layers: Block of a GPT, and TransformerEncoderLayer."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dispatch import fall_back
from . import plain
from .attention import CausalSelfAttention, MultiheadAttention
from .children import hooked, unfused
from .decode import KVCache
from .ffn import MLP, activation_name, fused, why_unfused
from .norm import LayerNorm, add_norm


class Block(plain.Block):
    """One layer of GPT-2 on llmkern's kernels; arguments and attributes as `llmkern.nn.plain.Block`.

    The add after the attention runs inside ln_2's kernel, the one after the MLP inside the MLP's.
    """

    parts = LayerNorm, CausalSelfAttention, MLP

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) to (B, T, C); the attention also sees the tokens in `cache`."""
        y, x = add_norm(self.ln_2, self.attn(self.ln_1(x), cache), x)
        if type(self.mlp) is MLP and not hooked(self.mlp):
            return self.mlp(y, x)
        return x + self.mlp(y)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on llmkern's kernels: same arguments and state_dict keys.

    Attention, norms with the add before them, and the feed-forward layer run as three or four ops.
    With an activation that `ops.ffn` does not know the linears run one by one.  Nested tensors are
    computed by torch.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps,
            batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass the input through the layer.

        Args:
            src: (B, S, d_model) with batch_first, else (S, B, d_model); or (S, d_model).
            src_mask, src_key_padding_mask, is_causal: as `MultiheadAttention`'s.

        Returns:
            A tensor like `src`.
        """
        if src.is_nested:
            reason = "the input is a nested tensor; TransformerEncoder(enable_nested_tensor=False) makes none"
            fall_back("TransformerEncoderLayer", reason)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = self.norm1(src) if self.norm_first else src
        attended = self._sa_block(x, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:  # Xiong et al. 2020, arXiv:2002.04745, figure 1
            y, x = add_norm(self.norm2, attended, src)
            return self._ff_block(y, x)
        x, _ = add_norm(self.norm1, attended, src)
        return add_norm(self.norm2, self._ff_block(x), x)[0]

    def _ff_block(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        reason = why_unfused(self.activation, self.dropout, self.linear1, self.linear2)
        if reason:
            unfused("TransformerEncoderLayer's feed-forward", reason, self.linear1, self.linear2)
            y = super()._ff_block(x)
            return y if residual is None else residual + y
        return fused(
            x, self.linear1, activation_name(self.activation), self.linear2,
            dropout=self.dropout, last=self.dropout2, residual=residual,
        )  # fmt: skip
