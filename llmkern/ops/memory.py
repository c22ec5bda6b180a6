"""Memory for outputs of the C++ kernels, kept when a tensor dies and given to the next one.

The C library returns large blocks to the system at once, and the small ones of a training step at its end,
so that every output begins with a page fault for each 4 KiB.  On a CPU that costs several times what a norm
or a loss computes.  As torch's allocator for GPUs, and like it emptied by `empty_cache`; at most a sixteenth
of the machine's memory is kept.
"""

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import _cpu

SMALLEST = 2**16  # bytes; smaller blocks the C library keeps itself
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pooled(out: Tensor) -> Tensor:
    """`out`, or if it is large a tensor like it, uninitialised as well, in memory that was used before."""
    if out.numel() * out.element_size() < SMALLEST or out.dtype not in DTYPES:
        return out
    return from_dlpack(_pool().empty(out))


def empty_cache() -> None:
    """Return to the system the memory that waits for the next large output, as `torch.cuda.empty_cache`."""
    if pool := _pool():
        pool.pool_release()


def keep(most: int) -> None:
    """Let `most` bytes at most wait for the next large output; 0 gives all back at once."""
    if pool := _pool():
        pool.pool_limit(most)


def cached_bytes() -> int:
    """How many bytes wait for the next large output."""
    return pool.pool_kept() if (pool := _pool()) else 0


def scratch_bytes() -> int:
    """How many bytes the threads hold that kernels take beside outputs; they stay for the next call."""
    return pool.scratch_held() if (pool := _pool()) else 0


@cache
def _pool() -> ModuleType | None:
    """The module that holds the pool: one for all instruction sets."""
    module = _cpu.load(_cpu.best())
    if isinstance(module, str):
        return None
    module.pool_limit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)
    return module
