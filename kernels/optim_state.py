"""Optimizer states in 8 bits, block by block; `llmkern/ops/optim_state.py` has the formulas."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(256)  # elements with one scale


@cache
def values(device: torch.device) -> Tensor:
    """(512,) float32: what each code stands for, of first moments, then of second ones."""
    signed, unsigned = _magnitudes(7), _magnitudes(8)
    return torch.tensor([*signed, *(-x for x in signed), *unsigned], device=device)


def _magnitudes(decades: int) -> list[float]:
    places = [(c, 2 ** (c.bit_length() - 1)) for c in range(1, 2**decades)]
    return [0.0] + [
        10.0 ** (power.bit_length() - decades) * (0.1 + 0.9 * (c - power + 1) / power) for c, power in places
    ]


@triton.jit
def decoded(codes, scales, table, at, inside, SIGNED: tl.constexpr):
    """Elements `at` of a state; `table` as `values` makes it."""
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if not SIGNED:
        code += 256
    return tl.load(table + code) * tl.load(scales + at // BLOCK, mask=inside, other=0.0)


@triton.jit
def encode(x, codes, scales, at, inside, BLOCKS: tl.constexpr, SIGNED: tl.constexpr):
    """Keep BLOCKS whole blocks x, whose first element is a multiple of 256."""
    x = tl.where(inside, x, 0.0)
    rows = tl.reshape(x, (BLOCKS, BLOCK))
    scale = tl.max(tl.abs(rows), 1) + tl.sum(rows * 0.0, 1)  # NaN where an element is not finite
    whole = scale[:, None] > 0
    divisor = tl.broadcast_to(tl.where(whole, scale[:, None], 1.0), (BLOCKS, BLOCK))
    share = tl.where(whole, tl.div_rn(rows, divisor), 0.0)
    code = tl.reshape(_nearest(share, SIGNED), (BLOCKS * BLOCK,))
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    # the scale of a block is written by its first element
    spread = tl.reshape(tl.broadcast_to(scale[:, None], (BLOCKS, BLOCK)), (BLOCKS * BLOCK,))
    tl.store(scales + at // BLOCK, spread, mask=inside & (at % BLOCK == 0))


@triton.jit
def _nearest(share, SIGNED: tl.constexpr):
    """The code nearest to each share: decades from the smallest on, each where the border to it is passed."""
    x = tl.abs(share)
    code = tl.zeros_like(x)
    DECADES: tl.constexpr = 7 if SIGNED else 8
    for i in tl.static_range(DECADES):
        count = 1.0 * (1 << i)
        unit = 10.0 ** (i - DECADES + 1)
        border = unit / 10 * (1 + 4.5 / count)
        if i == 0:
            border = unit / 2 if SIGNED else 0.0
        j = tl.floor(x * (count / 0.9 / unit) - count / 9 + 0.5)
        code = tl.where(x > border, tl.minimum(tl.maximum(j, 1.0), count) + (count - 1), code)
    if SIGNED:
        code += tl.where((share < 0) & (code > 0), 128.0, 0.0)
    return code
