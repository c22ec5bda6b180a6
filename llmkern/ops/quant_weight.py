"""Weights in 8 or 4 bits: what the codes stand for, and how to choose them.

One layout holds what GGUF calls Q8_0, Q4_0 and Q4_1, and int8 with a scale a row:

    qweight  (D_out, D) int8, or (D_out, D / 2) uint8 with two codes of 4 bits a byte: of each 32 neighbours
             the first 16 in the low halves of 16 bytes, the last 16 in the high halves
    scales   (D_out, G), each for a group of D / G neighbours along D
    mins     like scales, or None

    w = s q + m         8 bits q in -128 .. 127, 4 bits q in 0 .. 15, m the group's min
    w = s q, s (q - 8)  without mins: 8 bits, 4 bits

(Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, sec. 2.1; ggml's block_q8_0, block_q4_0, block_q4_1.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # codes of 4 bits are ordered within so many; a group is a multiple, or a whole row


class QuantWeight(NamedTuple):
    """A weight (D_out, D) in 8 or 4 bits; the layout is at the top of this file."""

    qweight: Tensor
    scales: Tensor
    mins: Tensor | None


def depth(qweight: Tensor) -> int:
    """D, the elements of a row."""
    return qweight.shape[1] * (2 if qweight.dtype == torch.uint8 else 1)


def quantize(
    weight: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> QuantWeight:
    """Round each weight to the nearest value that its group can hold.

    Args:
        weight: (D_out, D) floating point.
        bits: 8 or 4.
        group_size: neighbours along D that share a scale, a multiple of 32 that divides D; None is all of D.
        symmetric: without mins; s is max|w| / 127, or for 4 bits w / -8 of the w that is largest in
            magnitude, so that all 16 values serve.  Else s is (max - min) / 255 or / 15.
        scale_dtype: of scales and mins; None is float32 for whole rows and float16 for groups.

    Returns:
        A QuantWeight, its values within s / 2 of the weight's but for the rounding of s and m.

    Raises:
        ValueError: another weight, number of bits or group size.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits is {bits}, expected 8 or 4")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize: weight is {weight.dtype} of shape {tuple(weight.shape)}, expected floating point of "
            "shape (D_out, D)"
        )
    if reason := why_not(weight.shape[1], bits, group_size):
        raise ValueError(f"quantize: {reason}")
    scale_dtype = scale_dtype or (torch.float16 if group_size else torch.float32)
    w = weight.detach().float().unflatten(1, (-1, group_size or weight.shape[1]))  # (D_out, G, D / G)
    least, most = w.amin(-1), w.amax(-1)  # (D_out, G)
    low, high = (-128, 127) if bits == 8 else (0, 15)
    zero = 0 if bits == 8 else 8  # the code of 0, without mins
    if not symmetric:
        s = (most - least) / (high - low)
        m = least - low * s
    elif bits == 8:
        s, m, low = torch.maximum(most, -least) / 127, None, -127
    else:
        s, m = torch.where(most > -least, most, least) / -8, None
    s = s.to(scale_dtype)  # the codes are for s and m as they are kept
    m = None if m is None else m.to(scale_dtype)
    divisor = s.float().where(s != 0, 1.0)[..., None]
    q = (w / divisor + zero if m is None else (w - m.float()[..., None]) / divisor).round()
    q = q.nan_to_num(0.0).clamp(low, high).flatten(1)
    return QuantWeight(q.to(torch.int8) if bits == 8 else pack(q.to(torch.uint8)), s, m)


def why_not(depth: int, bits: int, group_size: int | None) -> str | None:
    """Why rows of `depth` elements cannot be quantised so, or None."""
    if group_size is not None and (group_size < BLOCK or group_size % BLOCK or depth % group_size):
        return f"group_size is {group_size}, expected a multiple of {BLOCK} that divides {depth}"
    if bits == 4 and depth % BLOCK:
        return f"a row has {depth} elements, expected a multiple of {BLOCK} for 4 bits"
    return f"a row has {depth} elements, expected at least 1" if depth < 1 else None


def dequantize(qweight: Tensor, scales: Tensor, mins: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight, (D_out, D), computed in `dtype`."""
    q = (unpack(qweight) if qweight.dtype == torch.uint8 else qweight).to(dtype)
    if qweight.dtype == torch.uint8 and mins is None:
        q = q - 8
    s = scales.to(dtype)[..., None]
    w = q.unflatten(1, (scales.shape[1], -1)) * s  # (D_out, G, D / G)
    return (w if mins is None else w + mins.to(dtype)[..., None]).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """Codes 0 .. 15, (D_out, D) uint8, two a byte, (D_out, D / 2)."""
    halves = codes.unflatten(1, (-1, 2, BLOCK // 2))  # (D_out, blocks, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """What `pack` was given."""
    blocks = packed.unflatten(1, (-1, BLOCK // 2))  # (D_out, blocks, 16)
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1)
