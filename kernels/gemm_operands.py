"""How a matrix product reads its operands: boxes by TMA where the GPU has it, else elements by address."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tma import aligned, uses_tma


class Operands(NamedTuple):
    """Arguments of a kernel.

    Attributes:
        args: a and b of each product, a descriptor or a tensor; None for one that is not there.
        strides: of each, rows first; 0 where they are not needed.
        loads: "pointers", or for boxes "n" or "t" for a and b as BLAS has it: "t" lies transposed in memory.
    """

    args: tuple
    strides: tuple[int, ...]
    loads: str


def operands(sizes: tuple, *pairs: tuple[Tensor | None, Tensor | None]) -> Operands:
    """For products of a (M, K) and b (K, N) of any strides, with BLOCK_M, BLOCK_N, BLOCK_K first in sizes."""
    there = [(a, b) for a, b in pairs if a is not None]
    orders = {order(a) + order(b) for a, b in there}
    loads = orders.pop() if len(orders) == 1 else ""
    block_m, block_n, block_k = sizes[:3]
    if len(loads) != 2 or not uses_tma(there[0][0]):
        flat = tuple(x for pair in pairs for x in pair)
        strides = tuple(s for x in flat for s in ((0, 0) if x is None else x.stride()))
        return Operands(flat, strides, "pointers")
    boxes = (block_m, block_k), (block_k, block_n)
    args = tuple(descriptor(x, box) for pair in pairs for x, box in zip(pair, boxes))
    return Operands(args, (0, 0) * len(args), loads)


def order(x: Tensor) -> str:
    """ "n" for a matrix whose rows TMA can read, "t" for one whose columns it can, else ""."""
    if not aligned(x):
        return ""
    for name, (far, near) in (("n", x.stride()), ("t", x.stride()[::-1])):
        if near == 1 and far > 1 and far * x.element_size() % 16 == 0:
            return name
    return ""


def descriptor(x: Tensor | None, box: tuple[int, int]) -> Any:
    if x is None:
        return None
    if order(x) == "t":
        x, box = x.t(), box[::-1]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box))


@triton.jit
def product(
    acc, a, b, row, col, first, last, M, N, K, a_m, a_k, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """acc plus the tile at (row, col) of a b, over the inner dimension from first to last."""
    if LOADS == "pointers":
        depth = tl.arange(0, BLOCK_K).to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)  # a row may be 2²⁵ elements long: 32 bits hold no 64 of them
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        a += rows.to(tl.int64)[:, None] * a_m + (first + depth)[None, :] * a_k
        b += (first + depth)[:, None] * b_k + cols.to(tl.int64)[None, :] * b_n
        for start in range(first, last, BLOCK_K):
            a_inside = (rows < M)[:, None] & (EVEN_K | (depth[None, :] < K - start))
            b_inside = (EVEN_K | (depth[:, None] < K - start)) & (cols < N)[None, :]
            a_tile = tl.load(a, mask=a_inside, other=0.0)
            b_tile = tl.load(b, mask=b_inside, other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
            a += step * a_k
            b += step * b_k
    else:
        for start in range(first, last, BLOCK_K):
            a_tile = _box(a, row, start, LOADS == "tn" or LOADS == "tt")
            b_tile = _box(b, start, col, LOADS == "nt" or LOADS == "tt")
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _box(x, row, col, TRANSPOSED: tl.constexpr):
    """The box of a matrix at (row, col); zero outside the matrix."""
    if TRANSPOSED:
        return tl.trans(x.load([col, row]))
    else:
        return x.load([row, col])
