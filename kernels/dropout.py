"""Dropout with an optional residual add; the mask is made again from the seed in backward."""

import triton
import triton.language as tl
from torch import Tensor

from . import config, philox
from .launch import fit, launch


def dropout_fwd(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, first: int, y: Tensor) -> None:
    """y (N, D) = residual + x m, m = 0 or 1 / (1 - p) by seed and place, where x begins at row `first`."""
    if not y.numel():
        return
    n, d = x.shape
    block = fit(d, 1, config.DROPOUT_BLOCK)
    rows = config.DROPOUT_ELEMENTS // block
    drop = philox.drop(seed, p)
    launch(
        _drop_kernel, x, (triton.cdiv(n, rows), triton.cdiv(d, block)),
        x, residual, drop.seed, y, n, d, first, drop.threshold, drop.scale,
        rows, block, warps=config.warps(rows * block),
    )  # fmt: skip


def dropout_bwd(dy: Tensor, seed: Tensor, p: float, first: int, needs: list[bool], dx: Tensor) -> None:
    """dx = dy m."""
    dropout_fwd(dy, None, seed, p, first, dx)


@triton.jit
def _drop_kernel(
    x, residual, seed, y, N, D, first, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = rows[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D)[None, :]
    keep = philox.keeps(tl.load(seed), first + rows[:, None], cols[None, :], threshold)
    out = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * tl.where(keep, scale, 0.0)
    if residual is not None:
        out += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)
