"""The tiled matrix product that all layers with weights are made of.

`gemm` is out = drop(a b (+ a2 b2) (+ bias)) (+ residual).  Kernels with an epilogue of their own
(`ffn.py`) use its parts: `blocks`, `programs`, `tile_origin`, `product`, `tile_at`.

Where operands come by TMA, programs stay for several tiles, so that the loads of the next tile run beside
the epilogue of this one.  A product with too few tiles for the GPU is cut along its inner dimension; the
parts are added in order by a second kernel, so that the result is the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tiles
from .gemm_operands import Operands, operands, product
from .launch import fit, launch, multiprocessors
from .philox import KEEP_ALL, Drop, dropped


def gemm(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None,
    a2: Tensor | None = None, b2: Tensor | None = None,
    residual: Tensor | None = None, drop: Drop = KEEP_ALL,
) -> None:  # fmt: skip
    """out = drop(a b + a2 b2 + bias) + residual; a (M, K) and b (K, N) with any strides, out and
    residual (M, N) contiguous; out has 0 elements if nobody wants it.

    bias (N,) may be None; a2 and b2 are like a and b, or None; residual may be out.  Sums are kept in
    float32.
    """
    if not out.numel():
        return
    (m, n), k = out.shape, a.shape[1]
    tile, sizes = blocks(a, m, n, k, heavy=(drop.seed is not None) + (residual is not None))
    read = operands(sizes, (a, b), (a2, b2))
    count = triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1])
    part, parts = k_parts(count, k, sizes[2])
    partial = out if parts == 1 else a.new_empty(parts, m, n, dtype=torch.float32)
    epilogue = (bias, bias.stride(0) if bias is not None else 0, residual, *drop)
    none = (None, 0, None, *KEEP_ALL)
    launch(
        _gemm_kernel, a, (count if parts > 1 else programs(a, count, read), parts),
        *read.args, partial, m, n, k, *read.strides, *(epilogue if parts == 1 else none), part,
        *sizes, config.GEMM_GROUP, read.loads, read.loads != "pointers" and parts == 1,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        block = fit(n, 16, config.GEMM_SUM)
        launch(
            _sum_parts_kernel, a, (m, triton.cdiv(n, block)),
            partial, out, m, n, *epilogue, parts, block, warps=config.warps(block),
        )  # fmt: skip


def blocks(a: Tensor, m: int, n: int, k: int, heavy: int = 0) -> tuple[tiles.Tile, tuple]:
    """The tile, and the constants BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K of a product of these sizes.

    heavy: 1 if the epilogue holds other tiles of the same size, or random numbers; 2 for both.
    """
    tile = tiles.find("gemm", a, heavy)
    block_k = fit(k, 16, tile.depth)
    return tile, (fit(m, 16, tile.rows), fit(n, 16, tile.cols), block_k, k % block_k == 0)


def programs(x: Tensor, count: int, read: Operands) -> int:
    """How many programs go over `count` tiles: as many as there are, or as run at once where they stay."""
    return count if read.loads == "pointers" else min(count, multiprocessors(x))


def k_parts(count: int, k: int, block_k: int) -> tuple[int, int]:
    """(length, number) of the parts of the inner dimension; depends on shapes alone."""
    parts = min(config.GEMM_PROGRAMS // count, k // (config.GEMM_STEPS * block_k))
    if parts < 2:
        return k, 1
    part = triton.cdiv(triton.cdiv(k, block_k), parts) * block_k
    return part, triton.cdiv(k, part)


@triton.jit
def tile_origin(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile; GROUP row blocks share columns in the L2 cache."""
    across = tl.cdiv(N, BLOCK_N)
    group = index // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    row = group * GROUP + index % (GROUP * across) % height
    return row * BLOCK_M, index % (GROUP * across) // height * BLOCK_N


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile, where each program has one."""
    row, col = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    return row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)


@triton.jit
def add_bias(acc, bias, stride, cols, N):
    if bias is not None:
        acc += tl.load(bias + cols.to(tl.int64) * stride, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_at(rows, cols, M, N):
    """Offsets of a tile in a contiguous (M, N) matrix, and which elements exist."""
    return rows.to(tl.int64)[:, None] * N + cols[None, :], (rows < M)[:, None] & (cols < N)[None, :]


@triton.jit
def _gemm_kernel(
    a, b, a2, b2, out, M, N, K, a_m, a_k, b_k, b_n, a2_m, a2_k, b2_k, b2_n,
    bias, bias_n, residual, seed, first_row, threshold, scale, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, LOADS: tl.constexpr, STAYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, K)
    out += tl.program_id(1).to(tl.int64) * M * N
    if STAYS:
        count = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for index in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            _gemm_tile(
                index, a, b, a2, b2, out, M, N, K, a_m, a_k, b_k, b_n, a2_m, a2_k, b2_k, b2_n,
                bias, bias_n, residual, seed, first_row, threshold, scale, 0, K,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, GROUP, LOADS,
            )  # fmt: skip
    else:
        _gemm_tile(
            tl.program_id(0), a, b, a2, b2, out, M, N, K, a_m, a_k, b_k, b_n, a2_m, a2_k, b2_k, b2_n,
            bias, bias_n, residual, seed, first_row, threshold, scale, first, last,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, GROUP, LOADS,
        )  # fmt: skip


@triton.jit
def _gemm_tile(
    index, a, b, a2, b2, out, M, N, K, a_m, a_k, b_k, b_n, a2_m, a2_k, b2_k, b2_n,
    bias, bias_n, residual, seed, first_row, threshold, scale, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    row, col = tile_origin(index, M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        acc, a, b, row, col, first, last, M, N, K, a_m, a_k, b_k, b_n,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
    )  # fmt: skip
    if a2 is not None:
        acc = product(
            acc, a2, b2, row, col, first, last, M, N, K, a2_m, a2_k, b2_k, b2_n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
        )  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    at, inside = tile_at(rows, cols, M, N)
    acc = _finished(acc, bias, bias_n, residual, at, inside, rows, cols, N, seed, first_row, threshold, scale)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finished(acc, bias, bias_n, residual, at, inside, rows, cols, N, seed, first_row, threshold, scale):
    """drop(acc + bias) + residual."""
    acc = add_bias(acc, bias, bias_n, cols, N)
    acc = dropped(acc, seed, first_row + rows.to(tl.int64)[:, None], cols[None, :], threshold, scale)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _sum_parts_kernel(
    partial, out, M, N, bias, bias_n, residual, seed, first_row, threshold, scale, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """The parts of a row of the product, added in order, and its epilogue."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = tile_at(rows, cols, M, N)
    acc = tl.zeros((1, BLOCK), tl.float32)
    plane = tl.num_programs(0).to(tl.int64) * N
    for part in range(0, parts):
        acc += tl.load(partial + part * plane + at, mask=inside, other=0.0)
    acc = _finished(acc, bias, bias_n, residual, at, inside, rows, cols, N, seed, first_row, threshold, scale)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
