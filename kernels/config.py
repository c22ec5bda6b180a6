"""Sizes that kernels share or choose by themselves; the tiles of their products are in `tiles.csv`."""

ATTENTION_DELTA = 2048  # elements of dout that one program multiplies by out

# attention for sm_90 in Gluon
HOPPER_L2 = 32 * 2**20  # bytes of keys and values that programs which run together share
PROVEN: frozenset[str] = frozenset()  # those Gluon kernels that were tested and timed on a device

DECODE_TOKENS = 16  # new ones that a program writes at most
DECODE_PROGRAMS = 512  # that shall run together: some for each multiprocessor of a large GPU
DECODE_SPLITS = 64  # at most, of one cache
DECODE_STEPS = 4  # tiles that a program shall have at least when the cache is full

GEMM_GROUP = 8  # row blocks that run together and share columns in the L2 cache
GEMM_PROGRAMS = 128  # that shall run together at least: a product with fewer tiles is cut along K,
GEMM_STEPS = 8  # into parts of so many steps at least,
GEMM_SUM = 1024  # which are added by programs of so many columns

QUANT_ROWS = 16  # at most, few
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


def warps(elements: int) -> int:
    """Warps of a program that goes over this many elements at once: 8 for each thread."""
    return max(1, min(32, elements // 256))
