"""What the attention kernels share: addresses, which keys a query sees, and the scores.

Query i is at position p = i + diagonal of the keys and sees the keys p - left .. p + right, of its own
document alone where there are documents.

Scores are kept in base 2, times log2(e), because exp2 is one instruction.  With an additive mask they
stay natural: masks of -3.4e38 must not become -inf.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .activation import tanh
from .launch import fit
from .philox import drop, keeps
from .tma import heads_fit, rows_of_heads, uses_tma

LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)
_BOOL = tl.constexpr(1)
_FLOAT = tl.constexpr(2)


class Rules(NamedTuple):
    """The op's arguments beside query, key and value."""

    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    spans: Tensor | None
    seed: Tensor | None
    diagonal: int
    left: int | None
    right: int | None
    scale: float
    softcap: float
    dropout_p: float

    @property
    def kind(self) -> int:
        """Of the mask: 0 none, 1 boolean, 2 additive."""
        return 0 if self.mask is None else 1 if self.mask.dtype == torch.bool else 2

    def arguments(self) -> tuple:
        """What every kernel takes behind the tensors' strides, from `mask` to `kept`."""
        unit = 1.0 if self.kind == 2 else LOG2E
        dropped = drop(self.seed, self.dropout_p)
        return (
            self.mask, *(self.mask.stride() if self.kind else (0,) * 4),
            self.alibi_slopes, *(self.alibi_slopes.stride() if self.alibi_slopes is not None else (0, 0)),
            self.spans, *(self.spans.stride()[:2] if self.spans is not None else (0, 0)),
            dropped.seed, self.diagonal, self.left, self.right,
            self.scale * (1.0 if self.softcap else unit), self.softcap or None, unit,
            dropped.threshold, dropped.scale,
        )  # fmt: skip


class Plan(NamedTuple):
    """How a kernel is run: sizes of its blocks, warps and pipeline stages."""

    block_d: int
    block_v: int
    block_m: int
    block_n: int
    tma: bool
    run: dict[str, int]

    def walked(self, x: Tensor, rows: int, width: int) -> Any:
        """x (B, H, S, D) as a kernel takes it that goes over its rows."""
        return rows_of_heads(x, rows, width) if self.tma else x


def plan(kernel: str, q: Tensor, k: Tensor, v: Tensor, rules: Rules, *walked: Tensor) -> Plan:
    """Blocks from the table of tiles, cut down to short inputs; whether `walked` tensors come by TMA.

    Rules whose tiles need registers too have rows of their own, or half the rows.
    """
    block_d, block_v = fit(q.shape[3], 16, 256), fit(v.shape[3], 16, 256)
    heavy = rules.kind > 0 or rules.softcap > 0 or rules.seed is not None or rules.spans is not None
    kind = max(block_d, block_v)
    tile = tiles.find(kernel, q, f"{kind} heavy") if heavy else None
    if tile is None:
        tile = tiles.find(kernel, q, kind)
        tile = tile._replace(rows=max(16, tile.rows // 2)) if heavy else tile
    block_m, block_n = fit(q.shape[2], 16, tile.rows), fit(k.shape[2], 16, tile.cols)
    by_tma = uses_tma(q) and all(map(heads_fit, walked))
    return Plan(block_d, block_v, block_m, block_n, by_tma, {"warps": tile.warps, "stages": tile.stages})


@triton.jit
def head_of(index, heads):
    """(index of batch and head together, batch, head), in 64 bits as every offset made of them."""
    index = index.to(tl.int64)
    return index, index // heads, index % heads


@triton.jit
def base(x, b, h, stride_b, stride_h):
    return x + b * stride_b + h * stride_h


@triton.jit
def source(x, b, h, stride_b, stride_h, TMA: tl.constexpr):
    """One head of x for load_rows: its address, or the descriptor and where it is in that."""
    if TMA:
        return x, b.to(tl.int32), h.to(tl.int32)
    else:
        return base(x, b, h, stride_b, stride_h)


@triton.jit
def load_rows(
    x, at, length, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows from `at` on of a head, (ROWS, BLOCK_D), 0 where there are none; not EDGE: all are there."""
    if TMA:
        return tl.reshape(x[0].load([x[1], x[2], at, 0]), (ROWS, BLOCK_D))
    else:
        ptrs, inside = tile_ptrs(x, at + tl.arange(0, ROWS), length, stride, DIM, BLOCK_D, EDGE)
        return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def tile_ptrs(
    x, rows, length, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """Addresses of rows of x, (rows, BLOCK_D), and which of them exist; not EDGE: all rows do."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    ptrs = x + rows.to(tl.int64)[:, None] * stride + dims
    inside = (dims < DIM) & ((rows < length)[:, None] | (not EDGE))
    return ptrs, inside


@triton.jit
def softmax_exp(x, KIND: tl.constexpr):
    """exp of a score difference."""
    if KIND == _FLOAT:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def to_log(top, total, KIND: tl.constexpr):
    """The natural log of Σ exp(scores) = total · exp(top)."""
    if KIND != _FLOAT:
        top *= _LN2
    return tl.where(total == 0.0, float("-inf"), top + tl.log(total))


@triton.jit
def from_log(lse, KIND: tl.constexpr):
    """lse as the scores have it; 0 for a row without keys, whose scores are all -inf."""
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    if KIND != _FLOAT:
        lse *= _LOG2E
    return lse


@triton.jit
def slope_of(alibi, b, h, alibi_b, alibi_h, unit):
    """The head's ALiBi slope as the scores have it; None without ALiBi."""
    if alibi is None:
        return None
    else:
        return tl.load(alibi + b * alibi_b + h * alibi_h) * unit


@triton.jit
def place_of(rows, s_q, spans, span_row, diagonal):
    """(position, first key of the document, its end) for each row; spans point at the batch."""
    if spans is None:
        return rows + diagonal, 0, 0
    else:
        at, real = spans + rows, rows < s_q
        first = tl.load(at, mask=real, other=0).to(tl.int32)
        end = tl.load(at + span_row, mask=real, other=0).to(tl.int32)
        return rows + tl.load(at + 2 * span_row, mask=real, other=0).to(tl.int32), first, end


@triton.jit
def keys_of(row, s_q, s_k, spans, span_row, diagonal, left, right):
    """(first key that the row sees, end of the keys that it sees); never fall from row to row."""
    low, high = 0, s_k
    place = row + diagonal
    if spans is not None:
        at = spans + tl.minimum(row, s_q - 1)
        low, high = tl.load(at).to(tl.int32), tl.load(at + span_row).to(tl.int32)
        place = row + tl.load(at + 2 * span_row).to(tl.int32)
    first, end = low, high
    if left is not None:
        first = tl.minimum(tl.maximum(place - left, low), high)
    if right is not None:
        end = tl.minimum(tl.maximum(place + right + 1, low), high)
    return first, end


@triton.jit
def key_range(
    block, s_q, s_k, spans, span_row, diagonal, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Keys in sight of a block of rows: (first, start and end of those in sight of every row, end)."""
    row = block * BLOCK_M
    last_row = tl.minimum(row + BLOCK_M, s_q) - 1
    first, end_of_first = keys_of(row, s_q, s_k, spans, span_row, diagonal, left, right)
    first_of_last, end = keys_of(last_row, s_q, s_k, spans, span_row, diagonal, left, right)
    first = first // BLOCK_N * BLOCK_N
    start, stop = first, first
    if (KIND == 0) & (spans is None):
        if left is not None:
            start = tl.cdiv(first_of_last, BLOCK_N) * BLOCK_N
        stop = tl.maximum(start, end_of_first // BLOCK_N * BLOCK_N)
    return first, start, stop, end


@triton.jit
def scores(
    s, mask, rows, cols, place, first, end, slope, mask_k, s_q, s_k, left, right, softcap, unit,
    DOCUMENTS: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(s with softcap, ALiBi, mask, and -inf where the key is out of sight; softcap's tanh).

    rows, cols and what belongs to rows broadcast to the shape of s, in either order; mask points at the
    rows already.  Not EDGE: all keys are in sight.
    """
    bent = s
    if softcap is not None:
        bent = tanh(s / softcap)
        s = bent * (softcap * unit)
    if slope is not None:
        s -= slope * tl.abs(place - cols).to(tl.float32)
    if EDGE:
        visible = cols < s_k
        if left is not None:
            visible = visible & (cols >= place - left)
        if right is not None:
            visible = visible & (cols <= place + right)
        if DOCUMENTS:
            visible = visible & (cols >= first) & (cols < end)
        if KIND:
            ptrs = mask + cols.to(tl.int64) * mask_k
            value = tl.load(ptrs, mask=(rows < s_q) & (cols < s_k), other=0)
            if KIND == _BOOL:
                visible = visible & (value != 0)
            else:
                s += value.to(tl.float32)
        s = tl.where(visible, s, float("-inf"))
    return s, bent


@triton.jit
def kept(seed, first_row, rows, cols, threshold, factor):
    """Factors of dropout for (rows, cols); the head's rows begin at first_row of the numbers."""
    return tl.where(keeps(seed, first_row + rows, cols, threshold), factor, 0.0)
