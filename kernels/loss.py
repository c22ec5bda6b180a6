"""Cross-entropy: one pass over each row of logits forward, one backward."""

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
        logits, target, weight, loss, top, log_total, classes, ignore_index, label_smoothing,
        label_smoothing > 0, block, warps=config.warps(block),
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
    launch(
        _backward_kernel, logits, (n, triton.cdiv(classes, block)),
        dloss, logits, target, weight, weight_sum, top, log_total, dlogits,
        classes, ignore_index, label_smoothing, smoothed, block, warps=config.warps(block),
    )  # fmt: skip


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
    logits, target, weight, loss, top_out, log_total_out, C, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * C
    top = float("-inf")
    total = 0.0  # Σ exp(z - top) so far
    gap = 0.0  # Σ w (top - z) so far: shifted by the maximum, large logits keep their digits
    weights = 0.0  # Σ w so far
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits + cols, mask=cols < C, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        if SMOOTHED:
            w = (cols < C).to(tl.float32)
            if weight is not None:
                w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
            before = tl.where(top == float("-inf"), 0.0, top)
            gap += weights * (shift - before) + tl.sum(tl.where(cols < C, w * (shift - z), 0.0), 0)
            weights += tl.sum(w, 0)
        top = above
    log_total = tl.log(total)

    t, kept, w = target_weight(target, weight, row, C, ignore_index)
    z_target = tl.load(logits + t, mask=(t >= 0) & (t < C), other=0.0).to(tl.float32)
    value = (1.0 - smoothing) * w * (log_total - (z_target - top))
    if SMOOTHED:
        value += smoothing / C * (gap + weights * log_total)
    tl.store(loss + row, tl.where(kept, value, 0.0))
    tl.store(top_out + row, top)
    tl.store(log_total_out + row, log_total)


@triton.jit
def _backward_kernel(
    dloss, logits, target, weight, weight_sum, top, log_total, dlogits, C, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = dloss (p (hot + ε/C Σ w) - ε/C w - hot at the target), with hot = (1 - ε) w[t]."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t, kept, w = target_weight(target, weight, row, C, ignore_index)
    hot = (1.0 - smoothing) * w
    d = tl.load(dloss + row)
    z = tl.load(logits + row * C + cols, mask=cols < C, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - tl.load(top + row) - tl.load(log_total + row))
    if SMOOTHED:
        each = smoothing / C
        if weight is not None:
            w_cols = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
            dz = p * (hot + each * tl.load(weight_sum)) - each * w_cols
        else:
            dz = p * (hot + smoothing) - each
    else:
        dz = p * hot
    dz = tl.where(cols == t, dz - hot, dz)
    dz = tl.where(kept, dz * d, 0.0)
    tl.store(dlogits + row * C + cols, dz.to(dlogits.dtype.element_ty), mask=cols < C)
