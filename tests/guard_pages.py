"""Tensors whose storage touches a page that nobody may read or write.

An access one byte outside such a tensor ends the process with SIGSEGV, in C++ kernels and in
Triton's interpreter alike; without it, reading a neighbour's memory goes unnoticed.
"""

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def guarded(x: Tensor, side: str = "end") -> Tensor:
    """A contiguous copy of `x` that ends (or starts) at a forbidden page.

    Args:
        x: any CPU tensor; the copy is contiguous and does not require a gradient.
        side: "end" finds accesses beyond the last element, "start" those before the first.
    """
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    if not size:
        return x.detach().clone()
    body = -(-size // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for address in (start, start + page + body):
        if _libc.mprotect(address, page, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page + (body - size if side == "end" else 0)
    # the tensor keeps `memory` alive
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x.detach())
