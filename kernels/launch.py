"""What every launcher needs: one way to launch, and blocks that fit small sizes."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# on AMD a warp has 64 threads, and blocks of more than four share out fewer registers
MOST_WARPS = 4 if torch.version.hip else 32


def launch(
    kernel: Callable, x: Tensor, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 2
) -> None:
    """Run `kernel` on the device of `x`; the interpreter's CPU tensors need no device.

    Multiplications fuse with additions, whatever the default of the Triton version is.
    """
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](*args, num_warps=min(warps, MOST_WARPS), num_stages=stages, enable_fp_fusion=True)


def architecture(x: Tensor) -> str:
    """The GPU that x is on, "sm_90" or "gfx942"; "" for the interpreter's CPU tensors."""
    if x.is_cuda:
        return _architecture_of(x.device.index)
    return "" if x.is_cpu else _current()


@cache
def _architecture_of(index: int) -> str:
    with torch.cuda.device(index):
        return _current()


def _current() -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.partition(":")[0]


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that x is on; for tensors that are on none, those of an H100."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def fit(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, within [low, high]."""
    return max(low, min(high, triton.next_power_of_2(max(1, size))))
