"""Functions of `torch.nn.functional` on llmkern's kernels, with torch's own arguments.

What a kernel does not take, torch computes, and it is told why, once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.attention import MAX_HEAD_DIM
from ..ops.dispatch import fall_back


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; what it takes and returns."""
    return attend(
        F.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


def attend(
    otherwise: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same, with the function that runs what the kernel does not take."""
    if reason := _why_not_attention(query, key, value, attn_mask, is_causal, enable_gqa):
        fall_back("scaled_dot_product_attention", reason)
        return otherwise(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return ops.attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _why_not_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> str | None:
    if q.is_nested or k.is_nested or v.is_nested:
        return "the input is a nested tensor"
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"query has {q.dim()} dimensions, expected 4"
    if mask is not None and is_causal:
        return "both attn_mask and is_causal are given"
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        return f"query, key, value have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if k.shape[1] != q.shape[1] and not enable_gqa:
        return f"key has {k.shape[1]} heads and query {q.shape[1]} without enable_gqa"
    width = max(q.shape[3], v.shape[3])
    if width > MAX_HEAD_DIM:
        return f"the head dim is {width}, expected at most {MAX_HEAD_DIM}"
    return None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`; what it takes and returns."""
    reason = None
    if target.dtype != torch.int64:
        reason = f"the target is {target.dtype}, not torch.int64 class indices"
    elif size_average is not None or reduce is not None:
        reason = "size_average or reduce is given, expected reduction"
    if reason:
        fall_back("cross_entropy", reason)
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return ops.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; what it takes and returns."""
    if reason := _why_not_norm(input, weight):
        fall_back("layer_norm", reason)
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`; what it takes and returns."""
    if reason := _why_not_norm(input, weight):
        fall_back("rms_norm", reason)
        return F.rms_norm(input, normalized_shape, weight, eps)
    return ops.rms_norm(input, normalized_shape, weight, eps)


def _why_not_norm(input: Tensor, weight: Tensor | None) -> str | None:
    if input.is_nested:
        return "the input is a nested tensor"
    if weight is not None and weight.dtype not in (input.dtype, torch.float32):
        return f"the input is {input.dtype} and the weight {weight.dtype}"
    return None


KERNELS: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    F.scaled_dot_product_attention: ("attention", scaled_dot_product_attention),
    F.cross_entropy: ("loss", cross_entropy),
    F.layer_norm: ("norm", layer_norm),
    F.rms_norm: ("norm", rms_norm),
}
"""torch's function -> the argument of `swap_` that turns it off, and ours."""
