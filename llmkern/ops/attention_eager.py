"""Attention as one writes it in torch: what the op is compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .op import opmath


def eager(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    causal_align="top_left", window=None, softcap=0.0, alibi_slopes=None, sinks=None, document_ids=None,
    dropout_seed=None, return_lse=False,
):  # fmt: skip
    """`llmkern.ops.attention` by torch: its own kernel where that can do it, else the whole score matrix."""
    s_q, s_k = query.shape[2], key.shape[2]
    shift = s_k - s_q if causal_align == "bottom_right" else 0
    if not (softcap or dropout_p or return_lse) and sinks is None:
        plain = is_causal and attn_mask is None and window is None and document_ids is None and not shift
        if not plain or alibi_slopes is not None:
            seen = _seen(query, key, shift, is_causal, window, document_ids)
            attn_mask = _mask(query, key, seen, attn_mask, alibi_slopes, shift)
            plain = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, plain, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    f = opmath(query.dtype)
    s = (1 / math.sqrt(query.shape[-1]) if scale is None else scale) * (query @ key.transpose(-1, -2)).to(f)
    if softcap:
        s = softcap * (s / softcap).tanh()
    seen = _seen(query, key, shift, is_causal, window, document_ids)
    mask = _mask(query, key, seen, attn_mask, alibi_slopes, shift)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    if sinks is not None:
        s = torch.cat((s, sinks.view(-1, 1, 1).expand(*s.shape[:3], 1)), -1)
    p = s.softmax(-1).masked_fill(s == -math.inf, 0.0)[..., :s_k]  # 0 where a row sees no key
    if dropout_p:
        rows = torch.arange(p[..., 0].numel(), device=p.device).view(*p.shape[:3], 1)
        p = p * philox.factors(dropout_seed, rows, torch.arange(s_k, device=p.device), dropout_p, f)
    out = p.to(query.dtype) @ value
    return (out, s.logsumexp(-1)) if return_lse else out


def _seen(query, key, shift, is_causal, window, document_ids) -> Tensor | None:
    """(S_q, S_k) or (B, 1, S_q, S_k), bool; None where all is seen."""
    seen = None
    left, right = window or (-1, -1)
    if is_causal or left != -1 or right != -1:
        i = torch.arange(query.shape[2], device=query.device)[:, None] + shift
        j = torch.arange(key.shape[2], device=query.device)
        right = 0 if is_causal else right
        seen = ((j >= i - left) | (left == -1)) & ((j <= i + right) | (right == -1))
    if document_ids is not None:
        runs = (document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0).cumsum(1)
        same = (runs[:, :, None] == runs[:, None])[:, None]
        seen = same if seen is None else seen & same
    return seen


def _mask(query, key, seen, attn_mask, alibi_slopes, shift) -> Tensor | None:
    """Everything in one mask, bool or added."""
    if alibi_slopes is not None:
        i = torch.arange(query.shape[2], device=query.device)[:, None] + shift
        distance = (i - torch.arange(key.shape[2], device=query.device)).abs()
        bias = -alibi_slopes.view(-1, query.shape[1], 1, 1).to(query.dtype) * distance
        if attn_mask is None:
            attn_mask = bias
        elif attn_mask.dtype == torch.bool:
            attn_mask = bias.masked_fill(~attn_mask, -math.inf)
        else:
            attn_mask = attn_mask + bias
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(query.dtype)
    if seen is None or attn_mask is None:
        return attn_mask if seen is None else seen
    return attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -math.inf)
