"""Sums over rows, in a fixed order: bias gradients, and the last stage of weight gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch


def column_sum(x: Tensor, out: Tensor) -> None:
    """Write the sum of x (N, D) over its rows, kept in float32, to out (D,), unless that has 0 elements.

    Long columns are cut into chunks of fixed length, and the sums of the chunks are added in a
    second pass: the same bits on every run and every GPU.
    """
    if not out.numel():
        return
    rows, width = x.shape
    chunks = triton.cdiv(rows, config.SUM_CHUNK)
    if chunks > 1:
        partial = x.new_empty(chunks, width, dtype=torch.float32)
        _launch(x, partial, chunks)
        x = partial
    _launch(x, out, 1)


def _launch(x: Tensor, out: Tensor, chunks: int) -> None:
    rows, width = x.shape
    cols = fit(width, 16, config.SUM_COLS)
    chunk = config.SUM_CHUNK if chunks > 1 else rows
    launch(
        _column_sum_kernel, x, (triton.cdiv(width, cols), chunks),
        x, out, rows, width, *x.stride(), chunk, config.SUM_ROWS, cols, warps=4,
    )  # fmt: skip


@triton.jit
def _column_sum_kernel(
    x, out, N, D, stride_n, stride_d, chunk, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, N)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_d
        inside = (rows < last)[:, None] & (cols < D)[None, :]
        total += tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1).to(tl.int64) * D + cols, result, mask=cols < D)
