"""Optimizer states in 8 bits: block-wise dynamic quantisation.

A state is cut into blocks of 256 elements; each is its largest magnitude, in float32, times what the codes
of its elements say (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861,
sec. 2).  A code is a dynamic tree (sec. 1.3): behind its sign, leading zeros count decades, and what follows
the first 1 is a fraction that divides the decade evenly,

    value(c) = 10^(i - n + 1) (0.1 + 0.9 (c - 2^i + 1) / 2^i),  i = ⌊log2 c⌋,  value(0) = 0,

with n = 7 decades and a sign for the first moment, 8 without for the second.  So the largest element of a
block is exact, and others are wrong by at most 0.7 % of it (0.35 % without sign), small ones by less.

A second moment above 0 never becomes 0: the step divides by its root.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .op import opmath

BLOCK = 256


def blocks(x: Tensor) -> int:
    """How many blocks, and so scales, x has."""
    return -(-x.numel() // BLOCK)


@cache
def magnitudes(decades: int) -> tuple[float, ...]:
    """What the codes 0 .. 2**decades - 1 stand for, without a sign."""
    powers = ((c, 2 ** (c.bit_length() - 1)) for c in range(1, 2**decades))
    return 0.0, *(
        10.0 ** (power.bit_length() - decades) * (0.1 + 0.9 * (c - power + 1) / power) for c, power in powers
    )


def quantize_state(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a state: uint8 like x, and one number a block.

    An element that is not finite makes the scale of its block NaN.
    """
    flat = x.detach().to(opmath(x.dtype)).flatten()
    padded = torch.nn.functional.pad(flat, (0, blocks(x) * BLOCK - flat.numel())).view(-1, BLOCK)
    scales = padded.abs().amax(1) + (padded * 0).sum(1) if len(padded) else padded.new_empty(0)
    share = torch.where(scales[:, None] > 0, padded / scales[:, None], 0.0)
    codes = torch.bucketize(share.abs(), share.new_tensor(_borders(signed)))
    codes = torch.where(share < 0, codes + 128, codes) if signed else codes
    return codes.flatten()[: flat.numel()].view(x.shape).to(torch.uint8), scales


def dequantize_state(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The state that `quantize_state` has rounded, in the dtype of its scales."""
    known = magnitudes(7 if signed else 8)
    table = scales.new_tensor((*known, *(-x for x in known)) if signed else known)
    share = table[codes.flatten().long()]
    return (share * scales.repeat_interleave(BLOCK)[: share.numel()]).view(codes.shape)


@cache
def _borders(signed: bool) -> tuple[float, ...]:
    """Between neighbouring magnitudes: a share belongs to the nearest code."""
    known = magnitudes(7 if signed else 8)
    first, *others = ((low + high) / 2 for low, high in pairwise(known))
    return first if signed else 0.0, *others
