"""What the reference of decode attention does with a cache: find places, rotate, write, read."""

import torch
from torch import Tensor

from .op import opmath

TINY = 2.0**-126  # the smallest scale that int8 values are divided by


def positions(
    q: Tensor, cache: Tensor, seqlens: Tensor, key: Tensor | None, table: Tensor | None, cos: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The queries' positions (B, S_q), and how many tokens each sequence has now (B,); both int64."""
    s_q = q.shape[2]
    total = seqlens.long() + (0 if key is None else s_q)
    most = cache.shape[2] * (1 if table is None else table.shape[1])
    most = most if cos is None else min(most, cos.shape[0])
    bad = (seqlens < 0) | (total > most)
    if bad.any():
        raise ValueError(
            f"decode_attention: cache_seqlens has {int(seqlens[bad][0])}, with "
            f"{0 if key is None else s_q} new tokens, expected 0 to {most} in all"
        )
    if table is not None:
        used = torch.arange(table.shape[1], device=q.device) * cache.shape[2] < total[:, None]
        wrong = used & ((table < 0) | (table >= cache.shape[0]))
        if wrong.any():
            raise ValueError(
                f"decode_attention: block_table has {int(table[wrong][0])}, expected 0 to "
                f"{cache.shape[0] - 1}"
            )
    return (total - s_q)[:, None] + torch.arange(s_q, device=q.device), total


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, interleaved: bool) -> Tensor:
    """(a, b) to (a cos - b sin, b cos + a sin), for pairs (a, b) of the rotary elements of x (B, H, S, D)."""
    if cos is None:
        return x
    rotary = 2 * cos.shape[1]
    shape, axis = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    a, b = x[..., :rotary].unflatten(-1, shape).unbind(axis)
    c, s = (t[positions.clamp(min=0)][:, None] for t in (cos, sin))  # (B, 1, S, R / 2)
    rotated = torch.stack((a * c - b * s, b * c + a * s), dim=axis).flatten(-2)
    return torch.cat((rotated, x[..., rotary:]), dim=-1)


def place(positions: Tensor, cache: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """(page, row) of each position (B, S); without a table, page b is sequence b."""
    size = cache.shape[2]
    if table is None:
        return torch.arange(len(positions), device=cache.device)[:, None].expand_as(positions), positions
    return table.long().gather(1, positions // size), positions % size


def write(cache: Tensor, scale: Tensor | None, at: tuple[Tensor, Tensor], new: Tensor) -> None:
    """Put new tokens, (B, H_kv, S, D), at their places."""
    pages, rows = at
    if scale is not None:
        token_scale = new.abs().amax(-1) / 127  # (B, H_kv, S)
        new = (new / token_scale.clamp(min=TINY)[..., None]).round()
        scale[pages, :, rows] = token_scale.transpose(1, 2).to(scale.dtype)
    cache[pages, :, rows] = new.transpose(1, 2).to(cache.dtype)


def read(cache: Tensor, scale: Tensor | None, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The cache as (B, H_kv, S, D) in `dtype`: pages in order, int8 times its scales."""
    if scale is not None:
        cache = cache.to(opmath(dtype)) * scale[..., None]
    if table is not None:
        table = table.long().clamp(0, len(cache) - 1)  # what no position uses may be anything
        cache = cache[table].transpose(1, 2).flatten(2, 3)  # (B, max_blocks, H_kv, block_size, D)
    return cache.to(dtype)
