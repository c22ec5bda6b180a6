"""Random numbers that are a function of their place: `llmkern/ops/philox.py` says which.

Philox4x32 with seven rounds (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Drop(NamedTuple):
    """What a kernel needs to drop elements: the seed, None for no dropout; the number of the first row;
    below which numbers an element is dropped; and the factor of what is kept."""

    seed: Tensor | None
    first_row: int = 0
    threshold: int = 0
    scale: float = 1.0


KEEP_ALL = Drop(None)


def drop(seed: Tensor | None, p: float, first_row: int = 0) -> Drop:
    """Drop with probability p; `seed` None or p 0: keep all."""
    if seed is None or p == 0:
        return KEEP_ALL
    return Drop(seed, first_row, min(int(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0)


@triton.jit
def words(seed, rows, cols):
    """The 32-bit numbers of the places (rows, cols), which broadcast; seed: a loaded int64."""
    c0 = (cols // 64 * 16 + cols % 16).to(tl.uint32) + tl.zeros_like(rows).to(tl.uint32)
    row = rows.to(tl.int64) + tl.zeros_like(cols).to(tl.int64)
    c1 = (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), 7)
    word = cols // 16 % 4
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))


@triton.jit
def keeps(seed, rows, cols, threshold):
    """Whether dropout keeps the places (rows, cols)."""
    return words(seed, rows, cols).to(tl.int64) >= threshold


@triton.jit
def dropped(x, seed, rows, cols, threshold, scale):
    """x as dropout leaves it; seed: a pointer, or None for no dropout."""
    if seed is not None:
        x *= tl.where(keeps(tl.load(seed), rows, cols, threshold), scale, 0.0)  # NaN stays NaN, as in torch
    return x
