"""Bugs that other projects shipped, and what is asked to hold for ours."""

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

COUNT = 38
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on


def bug(number: int, where: str) -> Callable:
    """Marks the test against one of the `COUNT` bugs; `where` names the issue."""
    return pytest.mark.bug(number, where)


def randn(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def far_apart(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random, with more than 2³¹ elements from each index of the first dimension to the next.

    The memory between them is never touched, and so never there.
    """
    apart = 2**31 + 64
    size = (shape[0] * apart + 2**20) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
    inner = torch.empty(shape[1:], device="meta").stride()
    x = torch.frombuffer(memory, dtype=dtype).as_strided(shape, (apart, *inner))
    return x.copy_(randn(*shape))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
