"""The tiled matrix product that all layers with weights are made of.

`gemm` is out = drop(a b (+ a2 b2) (+ bias)) (+ residual).  Kernels with an epilogue of their own
(`ffn.py`) use its parts: `tile_position`, `product`, `tile_at`.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch
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
    launch(
        _gemm_kernel, a, (triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1]),),
        a, b, a2, b2, bias, out, m, n, k, *a.stride(), *b.stride(),
        *(a2.stride() if a2 is not None else (0, 0)), *(b2.stride() if b2 is not None else (0, 0)),
        bias.stride(0) if bias is not None else 0, residual, *drop,
        *sizes, config.GEMM_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def blocks(a: Tensor, m: int, n: int, k: int, heavy: int = 0) -> tuple[config.Tile, tuple]:
    """The tile, and the constants BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K of a product of these sizes.

    heavy: 1 if the epilogue holds other tiles of the same size, or random numbers; 2 for both.
    """
    tile = config.GEMM[a.element_size(), heavy]
    block_k = fit(k, 16, config.GEMM_DEPTH[a.element_size()])
    return tile, (fit(m, 16, tile.rows), fit(n, 16, tile.cols), block_k, k % block_k == 0)


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile; GROUP row blocks share columns in the L2 cache."""
    pid = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    rows = group * GROUP + pid % (GROUP * across) % height
    cols = pid % (GROUP * across) // height
    return rows * BLOCK_M + tl.arange(0, BLOCK_M), cols * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def product(
    acc, a, b, rows, cols, M, N, K, a_m, a_k, b_k, b_n, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """acc plus the tile (rows, cols) of a b."""
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    a += rows.to(tl.int64)[:, None] * a_m + depth[None, :] * a_k
    b += depth[:, None] * b_k + cols.to(tl.int64)[None, :] * b_n
    for start in range(0, K, BLOCK_K):
        a_inside = (rows < M)[:, None] & (EVEN_K | (depth[None, :] < K - start))
        b_inside = (EVEN_K | (depth[:, None] < K - start)) & (cols < N)[None, :]
        a_tile = tl.load(a, mask=a_inside, other=0.0)
        b_tile = tl.load(b, mask=b_inside, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        a += BLOCK_K * a_k
        b += BLOCK_K * b_k
    return acc


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
    a, b, a2, b2, bias, out, M, N, K, a_m, a_k, b_k, b_n, a2_m, a2_k, b2_k, b2_n, bias_n,
    residual, seed, first_row, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    rows, cols = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(acc, a, b, rows, cols, M, N, K, a_m, a_k, b_k, b_n, BLOCK_K, EVEN_K)
    if a2 is not None:
        acc = product(acc, a2, b2, rows, cols, M, N, K, a2_m, a2_k, b2_k, b2_n, BLOCK_K, EVEN_K)
    acc = add_bias(acc, bias, bias_n, cols, N)
    acc = dropped(acc, seed, first_row + rows.to(tl.int64)[:, None], cols[None, :], threshold, scale)
    at, inside = tile_at(rows, cols, M, N)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
