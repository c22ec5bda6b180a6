"""Block sizes, warps and pipeline stages of every kernel: the one place that tuning changes.

Chosen by ahead-of-time compilation (`python -m benchmarks.aot`): on sm_80, sm_90, sm_100 and gfx942
none of them spills a register or asks for more shared memory than a block may have.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """One program's share of a matrix product, rows by columns, and how it is run."""

    rows: int
    cols: int
    warps: int
    stages: int


# attention: rows are queries, columns are keys; by (bytes of an element, padded head dim)
ATTENTION_FWD = {
    (2, 16): Tile(128, 64, 4, 3),
    (2, 32): Tile(128, 64, 4, 3),
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 2),
    (2, 256): Tile(64, 32, 8, 2),
    (4, 16): Tile(64, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 1),
    (4, 256): Tile(16, 32, 8, 1),
}
ATTENTION_DKV = {
    (2, 16): Tile(64, 64, 4, 2),
    (2, 32): Tile(32, 64, 4, 2),
    (2, 64): Tile(32, 64, 4, 2),
    (2, 128): Tile(32, 64, 8, 2),
    (2, 256): Tile(16, 32, 8, 1),
    (4, 16): Tile(32, 32, 4, 1),
    (4, 32): Tile(32, 32, 4, 1),
    (4, 64): Tile(32, 32, 8, 1),
    (4, 128): Tile(16, 32, 8, 1),
    (4, 256): Tile(32, 16, 8, 1),
}
ATTENTION_DQ = {
    (2, 16): Tile(64, 64, 4, 2),
    (2, 32): Tile(64, 64, 4, 2),
    (2, 64): Tile(64, 64, 4, 2),
    (2, 128): Tile(64, 32, 4, 2),
    (2, 256): Tile(16, 64, 8, 1),
    (4, 16): Tile(32, 32, 4, 1),
    (4, 32): Tile(32, 32, 4, 1),
    (4, 64): Tile(32, 32, 8, 1),
    (4, 128): Tile(32, 16, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}
ATTENTION_DELTA = 2048  # elements of dout that one program multiplies by out

# attention for sm_90 in Gluon: 16 bits, by padded head dim; rows are of two warpgroups
HOPPER_FWD = {64: Tile(128, 128, 4, 3), 128: Tile(128, 128, 4, 2)}
HOPPER_L2 = 32 * 2**20  # bytes of keys and values that programs which run together share
PROVEN: frozenset[str] = frozenset()  # those Gluon kernels that were tested and timed on a device

# decode attention: rows are queries, at least 16, columns are positions of the cache
DECODE = {
    (2, 16): Tile(64, 64, 4, 3),
    (2, 32): Tile(64, 64, 4, 3),
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(32, 64, 4, 3),
    (2, 256): Tile(16, 32, 4, 2),
    (4, 16): Tile(32, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(16, 32, 8, 2),
    (4, 128): Tile(16, 16, 8, 2),
    (4, 256): Tile(16, 16, 8, 1),
}
DECODE_TOKENS = 16  # new ones that a program writes at most
DECODE_PROGRAMS = 512  # that shall run together: some for each multiprocessor of a large GPU
DECODE_SPLITS = 64  # at most, of one cache
DECODE_STEPS = 4  # tiles that a program shall have at least when the cache is full

# matrix products; by (bytes of an element, how much the epilogue holds beside the product, see gemm.blocks)
GEMM = {
    (2, 0): Tile(128, 128, 8, 3),
    (2, 1): Tile(128, 64, 8, 3),
    (2, 2): Tile(64, 64, 8, 3),
    (4, 0): Tile(64, 64, 8, 2),
    (4, 1): Tile(64, 32, 8, 2),
    (4, 2): Tile(32, 32, 4, 2),
}
GEMM_DEPTH = {2: 64, 4: 16}  # of the inner dimension in one step, by bytes of an element
GEMM_GROUP = 8  # row blocks that run together and share columns in the L2 cache

# weights in 8 or 4 bits; by bytes of an element of x, and the depth of a product by whether x has few rows
QUANT = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 4, 2)}
QUANT_FEW = {2: Tile(16, 16, 4, 4), 4: Tile(16, 16, 4, 3)}
QUANT_ROWS = 16  # at most, few
QUANT_DEPTH = {(2, False): 32, (4, False): 16, (2, True): 128, (4, True): 32}
QUANT_DENSE = 512  # elements that one program makes dense

FFN_CHUNK = 8192  # rows whose hidden activations are there together, where they need not be kept
DROP_BLOCK = 1024

# rows of elements: norms, losses and sums
NORM_ELEMENTS = 2048  # of one program: several short rows, or a part of a long one
NORM_BLOCK = 8192  # the longest row that stays in registers
NORM_CHUNKS = 256  # groups of rows whose weight gradients are summed apart, then added
LOSS_BLOCK = 4096
LINEAR_LOSS_PART = 2048  # classes that one program of linear_cross_entropy reduces
LINEAR_LOSS_ROWS, LINEAR_LOSS_COLS = 8192, 4096  # most of dz in memory at once: 64 MiB in 16 bits
SOFTMAX_BLOCK = 8192  # the longest row that stays in registers
OPTIM_BLOCK = 2048  # elements of one program
DROPOUT_BLOCK, DROPOUT_ELEMENTS = 1024, 1024  # columns at most, and elements of one program
EMBEDDING_BLOCK = 2048  # of a row of the output
EMBEDDING_COLUMNS, EMBEDDING_ELEMENTS = 128, 1024  # of a row's gradient; and tokens times columns at once
ROPE_PAIRS = 256  # of a head at once
ROPE_ELEMENTS = 1024  # pairs of one program: of one token, over heads
SUM_ROWS, SUM_COLS = 32, 64  # of one step of a column sum
SUM_CHUNK = 512  # rows of one program of it


def attention(table: dict[tuple[int, int], Tile], nbytes: int, block_d: int, masked: bool) -> Tile:
    """The tile for elements of `nbytes` bytes; with a mask, whose tile needs registers too, half the rows."""
    tile = table[nbytes, block_d]
    return tile._replace(rows=max(16, tile.rows // 2)) if masked else tile


def warps(elements: int) -> int:
    """Warps of a program that goes over this many elements at once: 8 for each thread."""
    return max(1, min(32, elements // 256))
