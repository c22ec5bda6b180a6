"""The output layer and its cross-entropy: tiles of logits that live in registers.

Forward reduces them at once.  Backward makes them again, a part of the vocabulary at a time, and
keeps that part of dz for the products dx += dz W and dW = dzᵀ x: one recomputation serves both
gradients, sums are in float32, and no two programs write to one place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .activation import tanh
from .gemm import add_bias, blocks, gemm, tile_at, tile_origin
from .gemm_operands import operands, product
from .launch import fit, launch
from .loss import target_weight
from .reduce import column_sum


def linear_cross_entropy_fwd(
    x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None,
    factor: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    first: int, classes: int, early: list[bool],
    loss: Tensor, top: Tensor, log_total: Tensor, dx: Tensor, dhead: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """Losses (N,) of x (N, D) contiguous and head (C, D), and top and log_total as in cross_entropy_fwd.

    A target outside [0, classes) that is not ignore_index gives NaN.  Where C < classes the head has those
    from `first` on, and the losses are its terms of them.  With `factor`, the gradients of the losses' sum
    times it, too.
    """
    (n, dim), own = x.shape, head.shape[0]
    if not n:
        return
    smoothed = label_smoothing > 0
    parts = triton.cdiv(own, config.LINEAR_LOSS_PART)
    partial = x.new_empty(5 if smoothed else 3, parts, n, dtype=torch.float32)
    tile, sizes = blocks(x, n, own, dim, heavy=1)
    read = operands(sizes, (x, head.t()))
    launch(
        _partial_kernel, x, (triton.cdiv(n, sizes[0]), parts),
        *read.args, bias, target, weight, partial, n, own, first, dim, *read.strides, softcap,
        softcap > 0, smoothed, config.LINEAR_LOSS_PART, *sizes, read.loads,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    block = triton.next_power_of_2(parts)
    rows = fit(n, 1, max(1, config.LINEAR_LOSS_PART // block))
    launch(
        _loss_kernel, x, (triton.cdiv(n, rows),),
        partial, target, weight, loss, top, log_total, n, own, first, classes, parts, ignore_index,
        label_smoothing, z_loss, smoothed, block, rows, warps=config.warps(block * rows),
    )  # fmt: skip
    if factor is not None:
        dloss = factor.expand(n).contiguous()
        linear_cross_entropy_bwd(
            dloss, x, head, bias, target, weight, top, log_total, factor, dx, dhead, dbias, ignore_index,
            label_smoothing, z_loss, softcap, first, classes, early, dx, dhead, dbias,
        )  # fmt: skip


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None,
    top: Tensor, log_total: Tensor, factor: Tensor | None, early_dx: Tensor, early_dhead: Tensor,
    early_dbias: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    first: int, classes: int, needs: list[bool], dx: Tensor, dhead: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """Gradients from dloss (N,), made anew; those that nobody wants have no elements."""
    n, own = x.shape[0], head.shape[0]
    options = (first, classes, ignore_index, label_smoothing, z_loss, softcap)
    weighted = label_smoothing > 0 and weight is not None
    weight_sum = weight.sum(dtype=torch.float32) if weighted else None
    height, width = min(n, config.LINEAR_LOSS_ROWS), min(own, config.LINEAR_LOSS_COLS)
    bands = max(1, triton.cdiv(n, config.LINEAR_LOSS_ROWS))
    dx_sums, dhead_sums = _sums(dx, dx.shape), _sums(dhead, (width, x.shape[1]))
    dbias_sums = x.new_empty(bands, dbias.numel(), dtype=torch.float32)
    scratch = x.new_empty(height * width)
    for col in range(0, own, width):
        end = min(own, col + width)
        for band in range(bands):
            rows = slice(band * height, min(n, (band + 1) * height))
            dz = scratch[: (rows.stop - rows.start) * (end - col)].view(-1, end - col)
            state = (target[rows], top[rows], log_total[rows], dloss[rows])
            _gradient(x[rows], head, bias, weight, weight_sum, *state, options, col, dz)
            _add(dz, head[col:end], dx[rows], dx_sums[rows], col == 0, end == own)
            _add(dz.t(), x[rows], dhead[col:end], dhead_sums[: end - col], band == 0, band + 1 == bands)
            column_sum(dz, dbias_sums[band, col:end])
    column_sum(dbias_sums, dbias)


def _sums(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where partial sums of `out` wait: in float32; nowhere if it is not wanted."""
    return out.new_empty(shape if out.numel() else (0,), dtype=torch.float32)


def _add(a: Tensor, b: Tensor, out: Tensor, sums: Tensor, first: bool, last: bool) -> None:
    """Add a b to what `sums` holds; the last term goes to `out`."""
    if out.numel():
        gemm(a, b, out if last else sums, residual=None if first else sums)


def _gradient(
    x, head, bias, weight, weight_sum, target, top, log_total, dloss, options, col, dz
) -> None:  # fmt: skip
    (rows, cols), (own, dim) = dz.shape, head.shape
    if not dz.numel():
        return
    smoothing, softcap = options[3], options[5]
    tile, sizes = blocks(x, rows, cols, dim, heavy=1)
    read = operands(sizes, (x, head.t()))
    launch(
        _gradient_kernel, x, (triton.cdiv(rows, sizes[0]) * triton.cdiv(cols, sizes[1]),),
        *read.args, bias, weight, weight_sum, target, top, log_total, dloss, dz,
        rows, col, cols, own, dim, *read.strides, *options, softcap > 0, smoothing > 0,
        *sizes, config.GEMM_GROUP, read.loads, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _logits(
    x, head, bias, row, col, N, C, D, x_n, x_d, head_d, head_c, softcap, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """The logits of the rows from `row` and the classes from `col` on, in float32."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = product(
        z, x, head, row, col, 0, D, N, C, D, x_n, x_d, head_d, head_c,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
    )  # fmt: skip
    z = add_bias(z, bias, 1, col + tl.arange(0, BLOCK_N), C)
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _class_weights(weight, first, cols, C):
    """w of these classes of a head, whose first is `first`; 0 past its last."""
    w = (cols < C).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + first + cols, mask=cols < C, other=0.0).to(tl.float32)
    return w


@triton.jit
def _finite_or_0(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _partial_kernel(
    x, head, bias, target, weight, partial, N, C, first, D, x_n, x_d, head_d, head_c, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """Of PART classes: max z, Σ exp(z - top), z[t] or 0; for smoothing Σ w (top - z) and Σ w."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * PART, C)
    t = tl.load(target + rows, mask=rows < N, other=-1) - first
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    z_target = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)
    weights = 0.0
    for start in range(part * PART, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (cols < last)[None, :]
        z = _logits(
            x, head, bias, tl.program_id(0) * BLOCK_M, start, N, C, D, x_n, x_d, head_d, head_c, softcap,
            CAPPED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
        )  # fmt: skip
        z = tl.where(inside, z, float("-inf"))
        above = tl.maximum(top, tl.max(z, 1))
        shift = _finite_or_0(above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        z_target += tl.sum(tl.where(inside & (cols[None, :] == t[:, None]), z, 0.0), 1)
        if SMOOTHED:
            w = _class_weights(weight, first, cols, last)
            gap += weights * (shift - _finite_or_0(top))
            gap += tl.sum(tl.where(inside, w[None, :] * (shift[:, None] - z), 0.0), 1)
            weights += tl.sum(w, 0)
        top = above
    plane = tl.num_programs(1).to(tl.int64) * N
    at, mask = partial + part.to(tl.int64) * N + rows, rows < N
    tl.store(at, top, mask=mask)
    tl.store(at + plane, total, mask=mask)
    tl.store(at + 2 * plane, z_target, mask=mask)
    if SMOOTHED:
        tl.store(at + 3 * plane, gap, mask=mask)
        tl.store(at + 4 * plane, tl.zeros((BLOCK_M,), tl.float32) + weights, mask=mask)


@triton.jit
def _loss_kernel(
    partial, target, weight, loss, top_out, log_total_out, N, C, first, classes, parts, ignore_index,
    smoothing, z_loss,
    SMOOTHED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The parts of a row together: loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ w (lse - z) + ζ lse².

    The first term is that of the head which has the target.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    inside = rows < N
    plane = parts.to(tl.int64) * N
    at = partial + part.to(tl.int64)[:, None] * N + rows[None, :]
    mask = (part < parts)[:, None] & inside[None, :]
    tops = tl.load(at, mask=mask, other=float("-inf"))  # (PARTS, ROWS)
    top = tl.max(tops, 0)
    shift = _finite_or_0(top)
    totals = tl.load(at + plane, mask=mask, other=0.0)
    log_total = tl.log(tl.sum(totals * tl.exp(tops - shift[None, :]), 0))
    z_target = tl.sum(tl.load(at + 2 * plane, mask=mask, other=0.0), 0)
    t, kept, w = target_weight(target, weight, rows, classes, ignore_index, inside)
    elsewhere = (t >= 0) & (t < classes) & ((t < first) | (t >= first + C))
    value = tl.where(elsewhere, 0.0, (1.0 - smoothing) * w * (log_total - (z_target - top)))
    if SMOOTHED:
        gaps = tl.load(at + 3 * plane, mask=mask, other=0.0)
        weights = tl.load(at + 4 * plane, mask=mask, other=0.0)
        gap = tl.sum(gaps + weights * (shift[None, :] - _finite_or_0(tops)), 0)
        value += smoothing / classes * (gap + tl.sum(weights, 0) * log_total)
    lse = top + log_total
    value += tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
    tl.store(loss + rows, tl.where(kept, value, 0.0), mask=inside)
    tl.store(top_out + rows, top, mask=inside)
    tl.store(log_total_out + rows, log_total, mask=inside)


@triton.jit
def _gradient_kernel(
    x, head, bias, weight, weight_sum, target, top, log_total, dloss, dz, N, begin, COLS, C, D,
    x_n, x_d, head_d, head_c, first, classes, ignore_index, smoothing, z_loss, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """dz (N, COLS) of the head's classes from `begin` on:
    dloss (p (hot + ε/C Σ w + 2 ζ lse) - ε/C w - hot at the target) (1 - (z / κ)²), hot = (1 - ε) w[t].
    """
    row, col = tile_origin(tl.program_id(0), N, COLS, BLOCK_M, BLOCK_N, GROUP)
    rows, at_cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    cols = begin + at_cols
    z = _logits(
        x, head, bias, row, begin + col, N, C, D, x_n, x_d, head_d, head_c, softcap, CAPPED,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
    )  # fmt: skip
    inside = rows < N
    t, kept, w = target_weight(target, weight, rows, classes, ignore_index, inside)
    m = tl.load(top + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_total + rows, mask=inside, other=0.0)
    d = tl.where(kept, tl.load(dloss + rows, mask=inside, other=0.0), 0.0)
    hot = (1.0 - smoothing) * w
    from_p = hot + tl.where(z_loss > 0, 2.0 * z_loss * (m + log_sum), 0.0)
    if SMOOTHED:
        if weight is not None:
            from_p += smoothing / classes * tl.load(weight_sum)
        else:
            from_p += smoothing
    g = tl.exp(z - m[:, None] - log_sum[:, None]) * from_p[:, None]
    if SMOOTHED:
        g -= smoothing / classes * _class_weights(weight, first, cols, C)[None, :]
    g = tl.where(cols[None, :] == t[:, None] - first, g - hot[:, None], g)
    if CAPPED:
        g *= 1.0 - (z / softcap) * (z / softcap)
    g = tl.where(kept[:, None], g * d[:, None], 0.0)
    at, exists = tile_at(rows, at_cols, N, COLS)
    tl.store(dz + at, g.to(dz.dtype.element_ty), mask=exists)
