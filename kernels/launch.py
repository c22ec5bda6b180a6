"""What every launcher needs: the device guard, and blocks that fit small sizes."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def guard(x: Tensor) -> AbstractContextManager:
    """Launch on the device of `x`; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def fit(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, within [low, high]."""
    return max(low, min(high, triton.next_power_of_2(max(1, size))))
