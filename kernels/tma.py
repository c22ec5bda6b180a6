"""Tensor descriptors for TMA, the unit of NVIDIA GPUs from sm_90 on that copies boxes of tensors."""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import architecture

GPUS = ("sm_90", "sm_100", "sm_103", "sm_120")


def uses_tma(x: Tensor) -> bool:
    return x.element_size() == 2 and architecture(x) in GPUS


def aligned(x: Tensor) -> bool:
    """Whether x has elements and begins at a multiple of 16 bytes; a fake tensor has no address, and may."""
    return bool(x.numel()) and (is_fake(x) or x.data_ptr() % 16 == 0)


def heads_fit(x: Tensor) -> bool:
    """Whether TMA can read x (B, H, S, D): every step but the last is a multiple of 16 bytes."""
    steps = strides(x)
    fits = x.shape[3] % 8 == 0 and steps[3] == 1 and all(s > 0 and s % 8 == 0 for s in steps[:3])
    return fits and aligned(x)


def strides(x: Tensor) -> list[int]:
    """Those of x; of a dimension of size 1, whose stride says nothing, one that TMA takes."""
    return [8 if size == 1 and i < 3 else stride for i, (size, stride) in enumerate(zip(x.shape, x.stride()))]


def rows_of_heads(x: Tensor, rows: int, width: int) -> Any:
    """Describes x (B, H, S, D) with boxes of so many rows of one head; beyond D they are 0."""
    return TensorDescriptor(x, list(x.shape), strides(x), [1, 1, rows, width])
