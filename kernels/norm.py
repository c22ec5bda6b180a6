"""Layer norm and RMS norm: one pair of kernels, with the residual add before and its gradient after.

A program holds the first block of its rows in registers; the rest of rows longer than a block is
read again for the second step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch
from .reduce import column_sum


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    y: Tensor, h: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """y = (h - mean) rstd weight + bias with h = x + residual; x, y, h (N, D), mean, rstd (N,) float32."""
    _forward(x, residual, weight, bias, eps, y, h, mean, rstd)


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, y: Tensor, h: Tensor, rstd: Tensor
) -> None:
    """y = h rstd weight with h = x + residual; x, y, h (N, D), rstd (N,) float32."""
    _forward(x, residual, weight, None, eps, y, h, None, rstd)


def layer_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float, needs: list[bool],
    dx: Tensor, dweight: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """Gradients of layer_norm_fwd; dh comes from the uses of h itself and may be None."""
    _backward(dy, dh, h, weight, mean, rstd, dx, dweight, dbias)


def rms_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None,
    rstd: Tensor, eps: float, needs: list[bool],
    dx: Tensor, dweight: Tensor,
) -> None:  # fmt: skip
    """Gradients of rms_norm_fwd; dh comes from the uses of h itself and may be None."""
    _backward(dy, dh, h, weight, None, rstd, dx, dweight, dx.new_empty(0))


def _forward(x, residual, weight, bias, eps, y, h, mean, rstd) -> None:
    n, d = x.shape
    if not x.numel():
        return
    rows, block = _tile(d)
    launch(
        _forward_kernel, x, (triton.cdiv(n, rows),),
        x, residual, weight, bias, y, h, mean, rstd, n, d, eps,
        rows, block, warps=config.warps(rows * block),
    )  # fmt: skip


def _backward(dy, dh, h, weight, mean, rstd, dx, dweight, dbias) -> None:
    n, d = h.shape
    rows, block = _tile(d)
    chunk = rows * triton.cdiv(triton.cdiv(n, rows), config.NORM_CHUNKS)  # rows of one program
    chunks = triton.cdiv(n, chunk) if n else 0
    wide = d > block  # then the sums over rows do not fit beside a row: a kernel of their own
    dw, db = (p.new_empty(chunks, d, dtype=torch.float32) if p.numel() else None for p in (dweight, dbias))
    dx = dx if dx.numel() else None
    warps = config.warps(rows * block)
    if chunks and (dx is not None or not wide):
        launch(
            _backward_kernel, h, (chunks,),
            dy, dh, h, weight, mean, rstd, dx, *((None, None) if wide else (dw, db)),
            n, d, chunk, rows, block, warps=warps,
        )  # fmt: skip
    if chunks and wide and (dw is not None or db is not None):
        launch(
            _param_grads_kernel, h, (chunks, triton.cdiv(d, block)),
            dy, h, mean, rstd, dw, db, n, d, chunk, block, warps=warps,
        )  # fmt: skip
    for partial, grad in ((dw, dweight), (db, dbias)):
        if partial is not None:
            column_sum(partial, grad)


def _tile(d: int) -> tuple[int, int]:
    """(rows, columns) of a program's block."""
    block = fit(d, 1, config.NORM_BLOCK)
    return max(1, config.NORM_ELEMENTS // block), block


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_h(x, residual, h, at, mask):
    """The row block to normalise, in float32; x + residual is rounded and stored as h."""
    value = _load(x, at, mask)
    if residual is not None:
        value += _load(residual, at, mask)
        value = value.to(x.dtype.element_ty)
        tl.store(h + at, value, mask=mask)
    return value.to(tl.float32)


@triton.jit
def _merge(mean, m2, before, h, cols, D, CENTRED: tl.constexpr):
    """Add a block of columns to the running mean and sum of squared deviations.

    Chan, Golub, LeVeque 1979, Updating formulae and a pairwise algorithm, eq. 2.1: no cancellation
    for rows far from 0.  Not CENTRED: the mean is taken as 0.
    """
    if CENTRED:
        inside = (cols < D)[None, :]
        count = tl.minimum(D - before, cols.shape[0]).to(tl.float32)
        share = count / (before + count)
        block_mean = tl.sum(h, 1) / count  # columns beyond D are 0
        away = tl.where(inside, h - block_mean[:, None], 0.0)
        block_mean += tl.sum(away, 1) / count  # what rounding took from a mean far from 0
        away = tl.where(inside, h - block_mean[:, None], 0.0)
        step = block_mean - mean
        m2 += tl.sum(away * away, 1) + step * step * before * share
        mean += step * share
    else:
        m2 += tl.sum(h * h, 1)
    return mean, m2


@triton.jit
def _store_y(y, weight, bias, at, cols, mask, h, mean, rstd, D):
    out = (h - mean[:, None]) * rstd[:, None]
    if weight is not None:
        out *= _load(weight, cols, cols < D)[None, :]
    if bias is not None:
        out += _load(bias, cols, cols < D)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x, residual, weight, bias, y, h_out, mean_out, rstd_out, N, D, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None]
    base = rows[:, None] * D
    mean = tl.zeros((ROWS,), tl.float32)
    m2 = tl.zeros((ROWS,), tl.float32)

    first = _load_h(x, residual, h_out, base + cols[None, :], inside & (cols < D)[None, :])
    mean, m2 = _merge(mean, m2, 0, first, cols, D, mean_out is not None)
    for start in range(BLOCK, D, BLOCK):
        more = start + cols
        h = _load_h(x, residual, h_out, base + more[None, :], inside & (more < D)[None, :])
        mean, m2 = _merge(mean, m2, start, h, more, D, mean_out is not None)

    rstd = tl.div_rn(1.0, tl.sqrt_rn(m2 / D + eps))
    if mean_out is not None:
        tl.store(mean_out + rows, mean, mask=rows < N)
    tl.store(rstd_out + rows, rstd, mask=rows < N)

    at = base + cols[None, :]
    _store_y(y, weight, bias, at, cols, inside & (cols < D)[None, :], first, mean, rstd, D)
    for start in range(BLOCK, D, BLOCK):
        more = start + cols
        at, mask = base + more[None, :], inside & (more < D)[None, :]
        if residual is not None:
            h = _load(x, at, mask) + _load(residual, at, mask)
            h = h.to(x.dtype.element_ty).to(tl.float32)
        else:
            h = _load(x, at, mask)
        _store_y(y, weight, bias, at, more, mask, h, mean, rstd, D)


@triton.jit
def _normalised(h, mean, rstd, rows, N, at, mask):
    """n = (h - mean) rstd of a block; 0 where masked."""
    n = _load(h, at, mask)
    if mean is not None:
        n -= _load(mean, rows, rows < N)[:, None]
    return tl.where(mask, n * _load(rstd, rows, rows < N)[:, None], 0.0)


@triton.jit
def _weighted(dy, weight, cols, D):
    """g = dy weight."""
    if weight is not None:
        dy *= _load(weight, cols, cols < D)[None, :]
    return dy


@triton.jit
def _store_dx(dx, dh, at, mask, g, n, g_mean, gn_mean, rstd):
    out = rstd[:, None] * (g - g_mean[:, None] - n * gn_mean[:, None])
    if dh is not None:
        out += _load(dh, at, mask)
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy, dh, h, weight, mean, rstd, dx, dweight, dbias, N, D, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - n mean(g n)) + dh of a chunk of rows, and its sums of dy n and dy."""
    cols = tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * chunk
    for step in range(0, chunk, ROWS):
        rows = begin + step + tl.arange(0, ROWS)
        inside = (rows < N)[:, None]
        base = rows[:, None] * D
        at, mask = base + cols[None, :], inside & (cols < D)[None, :]
        n = _normalised(h, mean, rstd, rows, N, at, mask)
        d = _load(dy, at, mask)
        if dweight is not None:
            dw += d * n
        if dbias is not None:
            db += d
        if dx is not None:
            g = _weighted(d, weight, cols, D)
            g_mean = tl.sum(g, 1)
            gn_mean = tl.sum(g * n, 1)
            for start in range(BLOCK, D, BLOCK):
                more = start + cols
                at_more, mask_more = base + more[None, :], inside & (more < D)[None, :]
                n_more = _normalised(h, mean, rstd, rows, N, at_more, mask_more)
                g_more = _weighted(_load(dy, at_more, mask_more), weight, more, D)
                g_mean += tl.sum(g_more, 1)
                gn_mean += tl.sum(g_more * n_more, 1)
            g_mean = g_mean / D if mean is not None else tl.zeros((ROWS,), tl.float32)
            gn_mean /= D
            r = _load(rstd, rows, rows < N)
            _store_dx(dx, dh, at, mask, g, n, g_mean, gn_mean, r)
            for start in range(BLOCK, D, BLOCK):
                more = start + cols
                at_more, mask_more = base + more[None, :], inside & (more < D)[None, :]
                n_more = _normalised(h, mean, rstd, rows, N, at_more, mask_more)
                g_more = _weighted(_load(dy, at_more, mask_more), weight, more, D)
                _store_dx(dx, dh, at_more, mask_more, g_more, n_more, g_mean, gn_mean, r)
    partial = tl.program_id(0).to(tl.int64) * D + cols
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dw, 0), mask=cols < D)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(db, 0), mask=cols < D)


@triton.jit
def _param_grads_kernel(dy, h, mean, rstd, dweight, dbias, N, D, chunk, BLOCK: tl.constexpr):
    """Sums of dy n and dy over a chunk of rows, for one block of columns of wide rows."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((1, BLOCK), tl.float32)
    db = tl.zeros((1, BLOCK), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * chunk
    for step in range(0, chunk):
        rows = begin + step + tl.arange(0, 1)
        at, mask = rows[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D)[None, :]
        d = _load(dy, at, mask)
        db += d
        dw += d * _normalised(h, mean, rstd, rows, N, at, mask)
    partial = tl.program_id(0).to(tl.int64) * D + cols
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dw, 0), mask=cols < D)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(db, 0), mask=cols < D)
