"""Bytes that the C++ products take beside their outputs, which csrc/buffer.h keeps for the next call.

`diagnose` counts them in the memory of a step, since no tensor shows them.
"""

import torch

CHUNK = 2048  # rows of a chunk: kChunk of csrc/linear.h, kRows of csrc/linear_loss.cpp
CLASSES = 1024  # of a block of linear_cross_entropy: kCols of csrc/linear_loss.h
PACKED = 16 * 2**20  # bytes of the second operand at a time: kPackedBytes of csrc/gemm.h
ROW_PANELS, COL_PANELS, DEPTH = 144, 768, 384  # rows, columns and elements of a thread's block (csrc/gemm.h)
ROWS_APART, COLS_APART, PACKED_APART = 192, 256, 2 * 2**20  # kRowsApart and its like of csrc/gemm.h


def product(n: int, m: int, k: int) -> int:
    """Of a (n, k) times b (m, k) transposed: b in panels, and each thread's block of a and of sums."""
    if not n * m * k:
        return 0
    threads, packed = torch.get_num_threads(), 4 * m * k
    by_rows = n >= ROWS_APART * threads and packed <= PACKED_APART
    copies = threads if by_rows and (n > m or m < COLS_APART * threads) else 1  # each thread has all of b
    sums = min(n, ROW_PANELS) * min(m, COL_PANELS) if k > DEPTH else 0
    return copies * min(packed, PACKED) + 4 * threads * (min(n, ROW_PANELS) * min(k, DEPTH) + sums)


def early_rows(count: int) -> int:
    """Rows whose logits linear_cross_entropy holds at once where forward makes the gradients."""
    return min(count, min(512, max(64, -(-count // 4))))
