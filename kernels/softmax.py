"""softmax and log_softmax of rows: short rows stay in registers, of long ones every block is read twice."""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch


def softmax_fwd(x: Tensor, y: Tensor) -> None:
    """y (N, D) = exp(x - top) / Σ exp(x - top)."""
    _launch(_forward_kernel, False, x, y)


def softmax_bwd(dy: Tensor, y: Tensor, needs: list[bool], dx: Tensor) -> None:
    """dx = y (dy - Σ dy y)."""
    _launch(_backward_kernel, False, dy, y, dx)


def log_softmax_fwd(x: Tensor, y: Tensor) -> None:
    """y (N, D) = x - top - log Σ exp(x - top)."""
    _launch(_forward_kernel, True, x, y)


def log_softmax_bwd(dy: Tensor, y: Tensor, needs: list[bool], dx: Tensor) -> None:
    """dx = dy - exp(y) Σ dy."""
    _launch(_backward_kernel, True, dy, y, dx)


def _launch(kernel, log: bool, *tensors: Tensor) -> None:
    out = tensors[-1]
    if not out.numel():
        return
    n, d = out.shape
    block = fit(d, 1, config.SOFTMAX_BLOCK)
    rows = max(1, config.NORM_ELEMENTS // block)
    launch(
        kernel, out, (triton.cdiv(n, rows),),
        *tensors, n, d, log, d <= block, rows, block, warps=config.warps(rows * block),
    )  # fmt: skip


@triton.jit
def _place(start, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of a block of columns of the program's rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = start + tl.arange(0, BLOCK)
    return rows[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D)[None, :]


@triton.jit
def _load(x, at, mask, other):
    return tl.load(x + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _normalise(x, top, total, LOG: tl.constexpr):
    away = x - top[:, None]
    return away - tl.log(total)[:, None] if LOG else tl.exp(away) / total[:, None]


@triton.jit
def _gradient(g, y, total, LOG: tl.constexpr):
    return g - tl.exp(y) * total[:, None] if LOG else y * (g - total[:, None])


@triton.jit
def _forward_kernel(
    x, y, N, D, LOG: tl.constexpr, ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if ONE_BLOCK:
        at, mask = _place(0, N, D, ROWS, BLOCK)
        v = _load(x, at, mask, float("-inf"))
        top = tl.max(v, 1)
        total = tl.sum(tl.exp(v - top[:, None]), 1)
        tl.store(y + at, _normalise(v, top, total, LOG).to(y.dtype.element_ty), mask=mask)
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, BLOCK):
            at, mask = _place(start, N, D, ROWS, BLOCK)
            v = _load(x, at, mask, float("-inf"))
            above = tl.maximum(top, tl.max(v, 1))
            shift = tl.where(above == float("-inf"), 0.0, above)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(v - shift[:, None]), 1)
            top = above
        for start in range(0, D, BLOCK):
            at, mask = _place(start, N, D, ROWS, BLOCK)
            v = _load(x, at, mask, 0.0)
            tl.store(y + at, _normalise(v, top, total, LOG).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy, y, dx, N, D, LOG: tl.constexpr, ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if ONE_BLOCK:
        at, mask = _place(0, N, D, ROWS, BLOCK)
        g, v = _load(dy, at, mask, 0.0), _load(y, at, mask, 0.0)
        total = tl.sum(g if LOG else g * v, 1)
        tl.store(dx + at, _gradient(g, v, total, LOG).to(dx.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, BLOCK):
            at, mask = _place(start, N, D, ROWS, BLOCK)
            g = _load(dy, at, mask, 0.0)
            total += tl.sum(g if LOG else g * _load(y, at, mask, 0.0), 1)
        for start in range(0, D, BLOCK):
            at, mask = _place(start, N, D, ROWS, BLOCK)
            g, v = _load(dy, at, mask, 0.0), _load(y, at, mask, 0.0)
            tl.store(dx + at, _gradient(g, v, total, LOG).to(dx.dtype.element_ty), mask=mask)
