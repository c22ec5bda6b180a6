"""Random numbers that are a function of their place: `llmkern/ops/philox.py` says which.

Philox4x32 with seven rounds (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3).
"""

import triton
import triton.language as tl


def threshold(p: float) -> int:
    """Numbers below this are dropped: a share p of all 32-bit numbers."""
    return min(int(p * 2**32), 2**32 - 1)


def scale(p: float) -> float:
    """The factor of what dropout keeps."""
    return 1 / (1 - p) if p < 1 else 0.0


@triton.jit
def keeps(seed, rows, cols, threshold):
    """Whether dropout keeps the places (rows, cols), which broadcast; seed: a loaded int64."""
    c0 = (cols // 64 * 16 + cols % 16).to(tl.uint32) + tl.zeros_like(rows).to(tl.uint32)
    row = rows.to(tl.int64) + tl.zeros_like(cols).to(tl.int64)
    c1 = (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), 7)
    word = cols // 16 % 4
    number = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return number.to(tl.int64) >= threshold
