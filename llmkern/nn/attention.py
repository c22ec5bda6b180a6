"""Attention modules: MultiheadAttention and CausalSelfAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from . import plain
from .linear import Linear, linear


class CausalSelfAttention(plain.CausalSelfAttention):
    """Causal self-attention on llmkern's kernel; arguments and attributes as `llmkern.nn.plain`'s."""

    linear = Linear

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q, (B, H, T, D), on k and v, (B, H_kv, T, D); returns (B, H, T, D)."""
        return ops.attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on llmkern's kernel: same arguments, parameters and state_dict keys.

    The kernel never forms the attention weights, so pass `need_weights=False`; torch's default True and
    nested tensors are computed by torch.  A query that sees no key gives 0 before the output projection.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; B is the batch, L and S the lengths of query and key, E embed_dim.

        Args:
            query: (B, L, E) with batch_first, else (L, B, E); or (L, E) for one without a batch.
            key, value: (B, S, kdim) and (B, S, vdim), or (S, B, ...), or (S, ...).
            key_padding_mask: (B, S) or (S,); bool (True is left out) or a float added to the scores.
            need_weights: also return the weights, in which case torch computes all.
            attn_mask: (L, S) or (B · num_heads, L, S); bool (True is left out) or a float.
            average_attn_weights: average returned weights over the heads.
            is_causal: tells that attn_mask is the causal mask, which then is not read.

        Returns:
            (output like query, None), or with need_weights (output, weights).

        Raises:
            ValueError: shapes that do not match; is_causal without attn_mask.
        """
        if reason := self._why_torch(query, key, value, need_weights):
            fall_back("MultiheadAttention", reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))  # (B, H, L or S, D)
        extra = (self.bias_k is not None) + self.add_zero_attn  # keys that every query sees
        if extra and key_padding_mask is not None:  # these keys are not in the causal order
            is_causal = False
        mask = _merge(None if is_causal else attn_mask, key_padding_mask, q)
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra), value=mask.dtype == torch.bool)
        if self.bias_k is not None:
            k = torch.cat((k, self._heads(self.bias_k, True).expand(len(k), -1, -1, -1)), dim=2)
            v = torch.cat((v, self._heads(self.bias_v, True).expand(len(v), -1, -1, -1)), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        out = ops.attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal)  # (B, H, L, D)
        if batched and not self.batch_first:
            out = out.permute(2, 0, 1, 3).flatten(2)  # (L, B, E)
        else:
            out = out.transpose(1, 2).flatten(2)  # (B, L, E)
        out = out if batched else out[0]
        return linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _why_torch(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str | None:
        if need_weights:
            return "need_weights=True, torch's default, asks for weights that the kernel never forms"
        if query.is_nested or key.is_nested or value.is_nested:
            return "the input is a nested tensor"
        return None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value after their linears; self-attention needs one product for all three."""
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """(B, L, E), (L, B, E) or (L, E) to (B, H, L, D), without a copy."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """torch's two masks, in which True is left out, as the one of `ops.attention`, in which True takes part.

    q is (B, H, L, D); returns a mask that broadcasts to (B, H, L, S).
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1]))  # (B, 1, 1, S)
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = [q.new_zeros(m.shape).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks]
    return sum(added[1:], added[0])


def _check(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    def require(ok: bool, what: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"MultiheadAttention: {what}, expected {expected}")

    dims = query.dim(), key.dim(), value.dim()
    require(dims in ((3, 3, 3), (2, 2, 2)), f"query, key and value have {dims} dimensions", "3 or 2 each")
    widths = query.shape[-1], key.shape[-1], value.shape[-1]
    expected = module.embed_dim, module.kdim, module.vdim
    require(widths == expected, f"query, key and value have widths {widths}", f"{expected}")
    require(
        key.shape[:-1] == value.shape[:-1],
        f"value has shape {tuple(value.shape)}",
        f"batch and length of key, {tuple(key.shape)}",
    )
    batched, axis = query.dim() == 3, int(query.dim() == 3 and module.batch_first)  # axis of the length
    batch = query.shape[1 - axis] if batched else 1
    length, source = query.shape[axis], key.shape[axis]
    if key_padding_mask is not None:
        shape, expected = tuple(key_padding_mask.shape), (batch, source) if batched else (source,)
        require(shape == expected, f"key_padding_mask has shape {shape}", f"{expected}")
    if attn_mask is not None:
        shape, each = tuple(attn_mask.shape), (batch * module.num_heads, length, source)
        require(shape in (each[1:], each), f"attn_mask has shape {shape}", f"{each[1:]} or {each}")
    require(attn_mask is not None or not is_causal, "is_causal is True", "attn_mask to be the causal mask")
