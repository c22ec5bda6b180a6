"""Which keys a query sees, and what becomes of their scores: masks, windows, documents, biases, dropout."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .op import opmath


class Rules(NamedTuple):
    """What attention is told beside query, key and value; the arguments of its op, in order.

    Query i is at position p = i + diagonal of the keys, and sees the keys j with p - left ≤ j ≤ p + right.
    """

    mask: Tensor | None  # (B, H, S_q, S_k), bool or added
    alibi_slopes: Tensor | None  # (B, H)
    sinks: Tensor | None  # (H,)
    spans: Tensor | None  # (B, 3, S_q): the first key of the query's document, its end, the query's diagonal
    seed: Tensor | None  # of dropout
    diagonal: int  # where there are no spans
    left: int | None  # None: without limit
    right: int | None
    scale: float
    softcap: float  # 0: none
    dropout_p: float


def spans_of_documents(ids: Tensor) -> Tensor:
    """Spans of (B, S) document ids: neighbours with the same id are a document, that sees itself only."""
    batch, length = ids.shape
    at = torch.arange(length, device=ids.device).expand(batch, length)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = at.masked_fill(~starts, 0).cummax(1).values if length else at
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    end = (at + 1).masked_fill(~ends, length).flip(1).cummin(1).values.flip(1) if length else at
    return torch.stack((first, end, torch.zeros_like(at)), 1)


def spans_of_sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, length: int, align: str) -> Tensor:
    """Spans of packed sequences, query n in cu_seqlens_q[n] .. cu_seqlens_q[n + 1] - 1 and keys likewise.

    Queries behind the last sequence see no key.
    """
    q, k = (c.long() for c in (cu_seqlens_q, cu_seqlens_k))
    k = torch.cat((k, k[-1:]))
    which = torch.searchsorted(q, torch.arange(length, device=q.device), right=True) - 1
    first, end = k[which], k[which + 1]
    corner = torch.cat((q, q[-1:]))
    diagonal = k[which + 1] - corner[which + 1] if align == "bottom_right" else first - corner[which]
    return torch.stack((first, end, diagonal))[None]


def positions(q: Tensor, k: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Position of each query among the keys, and of each key: (B or 1, S_q, 1) and (S_k,)."""
    i = torch.arange(q.shape[2], device=q.device)
    diagonal = rules.diagonal if rules.spans is None else rules.spans[:, 2]
    return torch.atleast_2d(i + diagonal)[..., None], torch.arange(k.shape[2], device=q.device)


def visible(q: Tensor, k: Tensor, rules: Rules) -> Tensor | None:
    """(B or 1, S_q, S_k), bool: window and document; None if every query sees every key."""
    if rules.left is None and rules.right is None and rules.spans is None:
        return None
    i, j = positions(q, k, rules)
    seen = torch.ones_like(i == j)
    if rules.left is not None:
        seen = seen & (j >= i - rules.left)
    if rules.right is not None:
        seen = seen & (j <= i + rules.right)
    if rules.spans is not None:
        first, end, _ = rules.spans[..., None].unbind(1)
        seen = seen & (j >= first) & (j < end)
    return seen


def scores(q: Tensor, k: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """(B, H_kv, G, S_q, S_k), where the G query heads of a group share a key head:

        s = scale · q kᵀ,  then softcap · tanh(s / softcap),  - slope · |distance|,  + mask

    -inf where the key is out of sight.  And the derivative of softcap, None without it.
    """
    f = opmath(q.dtype)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    s = rules.scale * (q.to(f).unflatten(1, groups) @ k.to(f)[:, :, None].transpose(-1, -2))
    slope = None
    if rules.softcap:
        bent = (s / rules.softcap).tanh()
        s, slope = rules.softcap * bent, 1 - bent * bent
    if rules.alibi_slopes is not None:
        i, j = positions(q, k, rules)
        distance = (i - j).abs().to(f)[:, None, None]
        s = s - rules.alibi_slopes.unflatten(1, groups)[..., None, None] * distance
    if rules.mask is not None:
        mask = rules.mask.unflatten(1, groups)
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    seen = visible(q, k, rules)
    return s if seen is None else s.masked_fill(~seen[:, None, None], -math.inf), slope


def kept(q: Tensor, k: Tensor, rules: Rules) -> Tensor | None:
    """Factors of dropout, (B, H_kv, G, S_q, S_k): the number of place ((b · H + h) · S_q + i, j) decides."""
    if rules.seed is None:
        return None
    batch, heads, s_q, _ = q.shape
    rows = torch.arange(batch * heads * s_q, device=q.device)[:, None]
    cols = torch.arange(k.shape[2], device=q.device)
    factors = philox.factors(rules.seed, rows, cols, rules.dropout_p, opmath(q.dtype))
    return factors.view(batch, k.shape[1], -1, s_q, k.shape[2])


def visible_pairs(q: Tensor, k: Tensor, rules: Rules) -> int:
    """How many (query, key) pairs of one head of every sequence of the batch take part."""
    batch, s_q, s_k = q.shape[0], q.shape[2], k.shape[2]
    if rules.spans is not None and rules.spans.device.type != "meta":
        first, end, diagonal = rules.spans.unbind(1)
        at = torch.arange(s_q, device=q.device) + diagonal
        low = first if rules.left is None else (at - rules.left).clamp(first, end)
        high = end if rules.right is None else (at + rules.right + 1).clamp(first, end)
        return int((high - low).clamp(min=0).sum())
    pairs = s_q * s_k if rules.right is None else _up_to(s_q, s_k, rules.diagonal + rules.right)
    if rules.left is not None:
        pairs -= _up_to(s_q, s_k, rules.diagonal - rules.left - 1)
    return batch * max(0, pairs)


def _up_to(s_q: int, s_k: int, offset: int) -> int:
    """Σ_i of the keys j ≤ i + offset, 0 ≤ i < s_q."""
    first = max(0, -offset)  # the first query that sees a key
    full = max(first, s_k - 1 - offset)  # the first that sees all
    growing = max(0, min(s_q, full) - first)
    return growing * (2 * (first + offset) + growing + 1) // 2 + max(0, s_q - full) * s_k
