"""Cross-entropy: one pass over each row of logits forward, one backward.

Rows of 50257 logits begin anywhere; to read them 16 bytes at a time, blocks begin up to 16 bytes before the
row, and what belongs to its neighbours is put out afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    loss: Tensor, top: Tensor, log_total: Tensor,
) -> None:  # fmt: skip
    """Losses (N,) of logits (N, C), and top = max z and log_total = log Σ exp(z - top); all float32.

    A target outside [0, C) that is not ignore_index gives NaN.
    """
    n, classes = logits.shape
    if not n:
        return
    block = fit(classes, 16, config.LOSS_BLOCK)
    launch(
        _forward_kernel, logits, (n,),
        logits, target, weight, loss, top, log_total, n, classes, ignore_index, label_smoothing,
        label_smoothing > 0, _unit(logits), block, warps=config.warps(block),
    )  # fmt: skip


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, top: Tensor, log_total: Tensor,
    ignore_index: int, label_smoothing: float, needs: list[bool],
    dlogits: Tensor,
) -> None:  # fmt: skip
    """Gradient (N, C) from dloss (N,)."""
    n, classes = logits.shape
    if not n:
        return
    smoothed = label_smoothing > 0
    weight_sum = weight.sum(dtype=torch.float32) if smoothed and weight is not None else None
    block = fit(classes, 16, config.LOSS_BLOCK)
    unit = min(_unit(logits), _unit(dlogits))
    launch(
        _backward_kernel, logits, (n, triton.cdiv(classes + unit - 1, block)),
        dloss, logits, target, weight, weight_sum, top, log_total, dlogits,
        n, classes, ignore_index, label_smoothing, smoothed, unit, block, warps=config.warps(block),
    )  # fmt: skip


def _unit(x: Tensor) -> int:
    """Elements in 16 bytes, for rows that begin anywhere; 1 where all rows, or not even x, begin so."""
    unit = 16 // x.element_size()
    return unit if x.shape[1] % 16 and x.data_ptr() % 16 == 0 else 1


@triton.jit
def _row(x, row, C, UNIT: tl.constexpr):
    """(the last multiple of UNIT elements in x that is not behind the row's first, how far before it is)."""
    before = 0
    if UNIT > 1:
        before = (row * C % UNIT).to(tl.int32)
        return tl.multiple_of(x + (row * C - before), 16), before
    else:
        return x + row * C, before


@triton.jit
def _load(x, places, before, row, N, C, UNIT: tl.constexpr):
    """Elements of a row, in float32; `places` count from where `_row` begins; -inf outside of it."""
    inside = (places >= before) & (places < before + C)
    if UNIT > 1:
        if row + 1 < N:  # behind the row there are others, so that whole units can be read
            end = tl.multiple_of((before + C + UNIT - 1) // UNIT * UNIT, UNIT)
            z = tl.load(x + places, mask=places < end, other=float("-inf"))
        else:
            z = tl.load(x + places, mask=inside, other=float("-inf"))
        return tl.where(inside, z.to(tl.float32), float("-inf"))
    else:
        return tl.load(x + places, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _store(x, places, values, before, C, UNIT: tl.constexpr):
    """Write elements of a row: whole units at once, those at both ends one by one."""
    inside = (places >= before) & (places < before + C)
    values = values.to(x.dtype.element_ty)
    if UNIT > 1:
        first = tl.multiple_of((before + UNIT - 1) // UNIT * UNIT, UNIT)
        end = tl.multiple_of((before + C) // UNIT * UNIT, UNIT)
        whole = (places >= first) & (places < end)
        tl.store(x + places, values, mask=whole)
        tl.store(x + places, values, mask=inside & (whole == 0))
    else:
        tl.store(x + places, values, mask=inside)


@triton.jit
def target_weight(target, weight, row, C, ignore_index, mask=None):
    """(target, whether it counts, its class weight, NaN for a target out of range) of one row or many."""
    t = tl.load(target + row, mask=mask)
    kept = t != ignore_index
    valid = (t >= 0) & (t < C)
    w = 1.0
    if weight is not None:
        w = tl.load(weight + t, mask=valid, other=0.0).to(tl.float32)
    return t, kept, tl.where(valid, w, float("nan"))


@triton.jit
def _forward_kernel(
    logits, target, weight, loss, top_out, log_total_out, N, C, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, before_row = _row(logits, row, C, UNIT)
    top = float("-inf")
    total = 0.0  # Σ exp(z - top) so far
    gap = 0.0  # Σ w (top - z) so far: shifted by the maximum, large logits keep their digits
    weights = 0.0  # Σ w so far
    for start in range(0, before_row + C, BLOCK):
        places = start + tl.arange(0, BLOCK)
        cols = places - before_row
        z = _load(x, places, before_row, row, N, C, UNIT)
        above = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        if SMOOTHED:
            inside = (cols >= 0) & (cols < C)
            w = inside.to(tl.float32)
            if weight is not None:
                w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
            before = tl.where(top == float("-inf"), 0.0, top)
            gap += weights * (shift - before) + tl.sum(tl.where(inside, w * (shift - z), 0.0), 0)
            weights += tl.sum(w, 0)
        top = above
    log_total = tl.log(total)

    t, kept, w = target_weight(target, weight, row, C, ignore_index)
    z_target = tl.load(logits + row * C + t, mask=(t >= 0) & (t < C), other=0.0).to(tl.float32)
    value = (1.0 - smoothing) * w * (log_total - (z_target - top))
    if SMOOTHED:
        value += smoothing / C * (gap + weights * log_total)
    tl.store(loss + row, tl.where(kept, value, 0.0))
    tl.store(top_out + row, top)
    tl.store(log_total_out + row, log_total)


@triton.jit
def _backward_kernel(
    dloss, logits, target, weight, weight_sum, top, log_total, dlogits, N, C, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = dloss (p (hot + ε/C Σ w) - ε/C w - hot at the target), with hot = (1 - ε) w[t]."""
    row = tl.program_id(0).to(tl.int64)
    x, before_row = _row(logits, row, C, UNIT)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = places - before_row
    t, kept, w = target_weight(target, weight, row, C, ignore_index)
    hot = (1.0 - smoothing) * w
    d = tl.load(dloss + row)
    z = _load(x, places, before_row, row, N, C, UNIT)
    p = tl.exp(z - tl.load(top + row) - tl.load(log_total + row))
    if SMOOTHED:
        each = smoothing / C
        if weight is not None:
            w_cols = tl.load(weight + cols, mask=(cols >= 0) & (cols < C), other=0.0).to(tl.float32)
            dz = p * (hot + each * tl.load(weight_sum)) - each * w_cols
        else:
            dz = p * (hot + smoothing) - each
    else:
        dz = p * hot
    dz = tl.where(cols == t, dz - hot, dz)
    dz = tl.where(kept, dz * d, 0.0)
    y, _ = _row(dlogits, row, C, UNIT)
    _store(y, places, dz, before_row, C, UNIT)
