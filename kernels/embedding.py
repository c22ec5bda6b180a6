"""Embedding: token rows plus position rows; backward sums the gradients of each row in one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch


def embedding_fwd(
    idx: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None,
    padding_idx: int | None,
    y: Tensor,
) -> None:  # fmt: skip
    """y (N, D) = weight[idx] + position_weight[position_ids]; an index outside its table gives NaN."""
    n, d = y.shape
    if not y.numel():
        return
    block = fit(d, 1, config.EMBEDDING_BLOCK)
    positions = 0 if position_weight is None else position_weight.shape[0]
    launch(
        _gather_kernel, y, (n, triton.cdiv(d, block)),
        idx, weight, position_weight, position_ids, y, weight.shape[0], positions, d,
        block, warps=config.warps(block),
    )  # fmt: skip


def embedding_bwd(
    dy: Tensor, idx: Tensor, position_ids: Tensor | None, rows: int, positions: int,
    padding_idx: int | None, needs: list[bool],
    dweight: Tensor, dposition_weight: Tensor,
) -> None:  # fmt: skip
    """Gradients of embedding_fwd: the same bits on every run, as no addition is atomic."""
    _scatter(dy, idx, -1 if padding_idx is None else padding_idx, dweight)
    _scatter(dy, position_ids, -1, dposition_weight)


def _scatter(dy: Tensor, idx: Tensor | None, padding: int, dweight: Tensor) -> None:
    if not dweight.numel():
        return
    rows, d = dweight.shape
    in_order, tokens = torch.sort(idx, stable=True)
    start = torch.searchsorted(in_order, torch.arange(rows + 1, device=idx.device))
    block = fit(d, 1, config.EMBEDDING_COLUMNS)
    group = config.EMBEDDING_ELEMENTS // block  # tokens that are read together
    launch(
        _scatter_kernel, dy, (rows, triton.cdiv(d, block)),
        dy, tokens, start, dweight, d, padding,
        fit(idx.numel(), 1, group), block, warps=config.warps(group * block),
    )  # fmt: skip


@triton.jit
def _load_row(table, row, rows, cols, D):
    known = (row >= 0) & (row < rows)
    x = tl.load(table + tl.where(known, row, 0) * D + cols, mask=cols < D, other=0.0)
    return x.to(tl.float32) + tl.where(known, 0.0, float("nan"))


@triton.jit
def _gather_kernel(
    idx, weight, position_weight, position_ids, y, rows, positions, D, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = _load_row(weight, tl.load(idx + token), rows, cols, D)
    if position_weight is not None:
        out += _load_row(position_weight, tl.load(position_ids + token), positions, cols, D)
    tl.store(y + token * D + cols, out.to(y.dtype.element_ty), mask=cols < D)


@triton.jit
def _scatter_kernel(dy, tokens, start, dweight, D, padding, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of dy over the tokens of one row, in groups of fixed length."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(start + row)
    last = tl.where(row == padding, first, tl.load(start + row + 1))
    total = tl.zeros((GROUP, BLOCK), tl.float32)
    for begin in range(first, last, GROUP):
        at = begin + tl.arange(0, GROUP)
        token = tl.load(tokens + at, mask=at < last, other=0)
        mask = (at < last)[:, None] & (cols < D)[None, :]
        total += tl.load(dy + token[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dweight + row * D + cols, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=cols < D)
