"""Linear layer with a weight in 8 or 4 bits, dequantised on its way to the product.

Codes of 4 bits lie in blocks of 32, the first 16 in the low halves of 16 bytes: a tile of bytes is two
tiles of weights, and each meets its own columns of x.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config, tiles
from .gemm import add_bias, gemm, tile_at, tile_position
from .launch import fit, launch
from .reduce import column_sum


def quant_linear_fwd(
    x: Tensor, qweight: Tensor, scales: Tensor, mins: Tensor | None, bias: Tensor | None, y: Tensor
) -> None:
    """y = x Wᵀ + b; x (N, D) with any strides, qweight, scales and mins contiguous, y (N, D_out)."""
    if not y.numel():
        return
    (m, n), k = y.shape, x.shape[1]
    few = m <= config.QUANT_ROWS
    tile = tiles.find("quant", x, "few" if few else "many")
    rows, cols = fit(m, 16, tile.rows), fit(n, 16, tile.cols)
    int4, group, step = _codes(qweight, scales, k, tile.depth)
    launch(
        _quant_linear_kernel, x, (triton.cdiv(m, rows) * triton.cdiv(n, cols),),
        x, qweight, scales, mins, bias, y, m, n, k, *x.stride(), qweight.shape[1], scales.shape[1],
        bias.stride(0) if bias is not None else 0, group, int4, rows, cols, step, k % step == 0,
        config.GEMM_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def quant_linear_bwd(
    dy: Tensor, qweight: Tensor, scales: Tensor, mins: Tensor | None, needs: list[bool],
    dx: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """dx = dy W and db from dy (N, D_out); the weight is dense for a moment."""
    column_sum(dy, dbias)
    if not dx.numel():
        return
    n, k = qweight.shape[0], dx.shape[1]
    weight = dx.new_empty(n, k)
    int4, group, step = _codes(qweight, scales, k, config.QUANT_DENSE)
    launch(
        _dequantize_kernel, dy, (n, triton.cdiv(k, step)),
        qweight, scales, mins, weight, k, qweight.shape[1], scales.shape[1], group, int4, step, warps=1,
    )  # fmt: skip
    gemm(dy, weight, dx)


def _codes(qweight: Tensor, scales: Tensor, k: int, most: int) -> tuple[bool, int, int]:
    """Whether codes have 4 bits; the size of a group, 0 for a whole row; the depth of a step, within a group.

    A step is `most` deep, or for 4 bits, which give it two products, twice that.
    """
    int4 = qweight.shape[1] != k
    group = 0 if scales.shape[1] == 1 else k // scales.shape[1]
    step = fit(k, 32 if int4 else 16, 2 * most if int4 else most)
    while group % step:  # the group is a multiple of 32
        step //= 2
    return int4, group, step


@triton.jit
def affine(scales, mins, at, inside, WITH_HALF: tl.constexpr):
    """Scale and min of groups; codes of 4 bits without mins begin at -8."""
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if mins is not None:
        return scale, tl.load(mins + at, mask=inside, other=0.0).to(tl.float32)
    else:
        return scale, scale * (-8.0 if WITH_HALF else 0.0)


@triton.jit
def _quant_linear_kernel(
    x, qweight, scales, mins, bias, y, M, N, K, x_m, x_k, row_bytes, groups, bias_n,
    SIZE: tl.constexpr, INT4: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    rows, cols = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x += rows.to(tl.int64)[:, None] * x_m
    depth = tl.arange(0, BLOCK_K // 2 if INT4 else BLOCK_K)
    codes = qweight + cols.to(tl.int64)[None, :] * row_bytes + depth[:, None]
    at = cols.to(tl.int64) * groups
    scale, low = affine(scales, mins, at, cols < N, INT4)
    for start in range(0, K, BLOCK_K):
        if SIZE:
            scale, low = affine(scales, mins, at + start // SIZE, cols < N, INT4)
        if INT4:
            first = start + depth // 16 * 32 + depth % 16  # of x, for the low halves
            there = EVEN_K | (first < K)
            q = tl.load(codes + start // 2, mask=there[:, None] & (cols < N)[None, :], other=0)
            a_inside = (rows < M)[:, None] & there[None, :]
            a = tl.load(x + first.to(tl.int64)[None, :] * x_k, mask=a_inside, other=0.0)
            b = (q & 15).to(tl.float32) * scale[None, :] + low[None, :]
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
            a = tl.load(x + (first + 16).to(tl.int64)[None, :] * x_k, mask=a_inside, other=0.0)
            b = (q >> 4).to(tl.float32) * scale[None, :] + low[None, :]
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
        else:
            there = EVEN_K | (start + depth < K)
            q = tl.load(codes + start, mask=there[:, None] & (cols < N)[None, :], other=0)
            a_inside = (rows < M)[:, None] & there[None, :]
            a = tl.load(x + (start + depth).to(tl.int64)[None, :] * x_k, mask=a_inside, other=0.0)
            b = q.to(tl.float32) * scale[None, :] + low[None, :]
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    acc = add_bias(acc, bias, bias_n, cols, N)
    out, inside = tile_at(rows, cols, M, N)
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    qweight, scales, mins, weight, K, row_bytes, groups,
    SIZE: tl.constexpr, INT4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1) * BLOCK // SIZE if SIZE else 0
    scale, low = affine(scales, mins, row * groups + group, True, INT4)
    if INT4:
        q = tl.load(qweight + row * row_bytes + k // 32 * 16 + k % 16, mask=k < K, other=0)
        q = (q >> (k % 32 // 16 * 4).to(tl.uint8)) & 15
    else:
        q = tl.load(qweight + row * row_bytes + k, mask=k < K, other=0)
    w = q.to(tl.float32) * scale + low
    tl.store(weight + row * K + k, w.to(weight.dtype.element_ty), mask=k < K)
