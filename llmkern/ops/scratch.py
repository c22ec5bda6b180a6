"""Bytes that the C++ products take beside their outputs, which csrc/buffer.h keeps for the next call.

`diagnose` counts them in the memory of a step, since no tensor shows them.
"""

import torch

CHUNK = 2048  # rows of a chunk: kChunk of csrc/linear.h, kRows of csrc/linear_loss.cpp
CLASSES = 1024  # of a block of linear_cross_entropy: kCols of csrc/linear_loss.h
PACKED = 16 * 2**20  # bytes of the second operand at a time: kPackedBytes of csrc/gemm.h
ROW_PANELS, COL_PANELS, DEPTH = (
    144,
    768,
    384,
)  # of a thread's block, in rows, columns and elements (csrc/gemm.h)


def product(n: int, m: int, k: int) -> int:
    """Of a (n, k) times b (m, k) transposed: b in panels, and each thread's block of a and of sums."""
    if not n * m * k:
        return 0
    sums = min(n, ROW_PANELS) * min(m, COL_PANELS) if k > DEPTH else 0
    return min(4 * m * k, PACKED) + 4 * torch.get_num_threads() * (min(n, ROW_PANELS) * min(k, DEPTH) + sums)


def early_rows(count: int) -> int:
    """Rows whose logits linear_cross_entropy holds at once where forward makes the gradients."""
    return min(count, min(512, max(64, -(-count // 8))))
