"""What the attention kernels share: addresses, and the scores with everything that hides them.

Scores are kept in base 2, as scale · log2(e) · q kᵀ, because exp2 is one instruction.  With an
additive mask they stay natural: masks of -3.4e38 must not become -inf.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit

LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)
_BOOL = tl.constexpr(1)
_FLOAT = tl.constexpr(2)


class Plan(NamedTuple):
    """How a kernel is run: sizes of its blocks, KIND of its mask, warps and pipeline stages."""

    block_d: int
    block_m: int
    block_n: int
    kind: int  # 0 no mask, 1 boolean, 2 additive
    run: dict[str, int]


def plan(table: dict[tuple[int, int], config.Tile], q: Tensor, k: Tensor, mask: Tensor | None) -> Plan:
    """Blocks from a table of `config`, cut down to short inputs."""
    block_d = fit(q.shape[3], 16, 256)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    tile = config.attention(table, q.element_size(), block_d, kind > 0)
    block_m, block_n = fit(q.shape[2], 16, tile.rows), fit(k.shape[2], 16, tile.cols)
    return Plan(block_d, block_m, block_n, kind, {"warps": tile.warps, "stages": tile.stages})


def scaled(scale: float, kind: int) -> float:
    """The factor that makes scores of q kᵀ."""
    return scale if kind == 2 else scale * LOG2E


@triton.jit
def head_of(index, heads):
    """(index of batch and head together, batch, head), in 64 bits as every offset made of them."""
    index = index.to(tl.int64)
    return index, index // heads, index % heads


@triton.jit
def base(x, b, h, stride_b, stride_h):
    return x + b * stride_b + h * stride_h


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
def scores(
    s, mask, rows, cols, stride_k, s_q, s_k, offset, CAUSAL: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """s with the mask added, and -inf where the key is out of sight.

    rows and cols broadcast to the shape of s, in either order; mask points at the rows already.
    """
    visible = cols < s_k
    if CAUSAL:
        visible = visible & (cols <= rows + offset)
    if KIND:
        ptrs = mask + cols.to(tl.int64) * stride_k
        value = tl.load(ptrs, mask=(rows < s_q) & (cols < s_k), other=0)
        if KIND == _BOOL:
            visible = visible & (value != 0)
        else:
            s += value.to(tl.float32)
    return tl.where(visible, s, float("-inf"))
