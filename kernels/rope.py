"""Rotary position embeddings: one launch rotates query and key, out of place or in place.

A program takes one token and some heads of the query or of the key.  Backward is the rotation by the
negative angle.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import fit, launch


def rope_fwd(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool,
    query_out: Tensor, key_out: Tensor,
) -> None:  # fmt: skip
    """Rotate query and key (B, H, S, D) by the tables (positions, pairs); a position outside them: NaN."""
    _rotate([(query, query_out), (key, key_out)], cos, sin, position_ids, interleaved, 1.0)


def rope_bwd(
    dquery_out: Tensor, dkey_out: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, needs: list[bool],
    dquery: Tensor, dkey: Tensor,
) -> None:  # fmt: skip
    """Gradients of rope_fwd."""
    _rotate([(dquery_out, dquery), (dkey_out, dkey)], cos, sin, position_ids, interleaved, -1.0)


def rope_inplace_fwd(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool,
) -> None:  # fmt: skip
    """As rope_fwd, written over its inputs."""
    _rotate([(query, query), (key, key)], cos, sin, position_ids, interleaved, 1.0)


def _rotate(
    pairs: list[tuple[Tensor | None, Tensor | None]], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, sign: float,
) -> None:  # fmt: skip
    wanted = [(x, y) for x, y in pairs if y is not None and y.numel()]
    if not wanted:
        return
    (x, y), (x2, y2) = wanted[0], wanted[1] if len(wanted) > 1 else (None, None)
    batch, heads, length, dim = x.shape
    block = fit(cos.shape[1], 1, config.ROPE_PAIRS)
    group = fit(max(t.shape[1] for t, _ in wanted), 1, config.ROPE_ELEMENTS // block)  # heads of a program
    groups = [triton.cdiv(t.shape[1], group) for t, _ in wanted]
    ids_strides = (0, 0)
    if position_ids is not None:
        ids_strides = (position_ids.stride(0) if position_ids.shape[0] > 1 else 0, position_ids.stride(1))
    copy = y is not x and dim > 2 * cos.shape[1]
    launch(
        _rotate_kernel, x, (batch * length, sum(groups)),
        x, y, x2, y2, cos, sin, position_ids,
        *_strides(x), *_strides(y), *_strides(x2), *_strides(y2), *ids_strides,
        length, heads, 0 if x2 is None else x2.shape[1], dim, cos.shape[0], cos.shape[1], groups[0], sign,
        interleaved, copy, group, block, warps=config.warps(group * block),
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, heads and length."""
    return (0, 0, 0) if x is None else x.stride()[:3]


@triton.jit
def _rotate_kernel(
    x, y, x2, y2, cos, sin, position_ids,
    x_b, x_h, x_s, y_b, y_h, y_s, x2_b, x2_h, x2_s, y2_b, y2_h, y2_s, ids_b, ids_s,
    S, H, H2, D, positions, pairs, groups, sign,
    INTERLEAVED: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    group = tl.program_id(1)
    position = s
    if position_ids is not None:
        position = tl.load(position_ids + b * ids_b + s * ids_s)
    known = (position >= 0) & (position < positions)
    cos += tl.where(known, position, 0) * pairs
    sin += tl.where(known, position, 0) * pairs
    sign = tl.where(known, sign, float("nan"))
    if group < groups:
        _rotate_heads(
            x + b * x_b + s * x_s, y + b * y_b + s * y_s, x_h, y_h, cos, sin,
            group, H, D, pairs, sign, INTERLEAVED, COPY, HEADS, BLOCK,
        )  # fmt: skip
    else:
        if x2 is not None:
            _rotate_heads(
                x2 + b * x2_b + s * x2_s, y2 + b * y2_b + s * y2_s, x2_h, y2_h, cos, sin,
                group - groups, H2, D, pairs, sign, INTERLEAVED, COPY, HEADS, BLOCK,
            )  # fmt: skip


@triton.jit
def _rotate_heads(
    x, y, x_h, y_h, cos, sin, group, H, D, pairs, sign,
    INTERLEAVED: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's elements of a group of heads; x, y, cos and sin point to that token."""
    heads = group * HEADS + tl.arange(0, HEADS)
    inside = (heads < H)[:, None]
    x += heads.to(tl.int64)[:, None] * x_h
    y += heads.to(tl.int64)[:, None] * y_h
    for start in range(0, pairs, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        c = tl.load(cos + cols, mask=cols < pairs, other=0.0)[None, :]
        s = tl.load(sin + cols, mask=cols < pairs, other=0.0)[None, :] * sign
        if INTERLEAVED:
            both = 2 * start + tl.arange(0, 2 * BLOCK)
            mask = inside & (both < 2 * pairs)[None, :]
            v = tl.load(x + both[None, :], mask=mask, other=0.0).to(tl.float32)
            p, q = tl.split(tl.reshape(v, (HEADS, BLOCK, 2)))
            v = tl.reshape(tl.join(p * c - q * s, q * c + p * s), (HEADS, 2 * BLOCK))
            tl.store(y + both[None, :], v.to(y.dtype.element_ty), mask=mask)
        else:
            mask = inside & (cols < pairs)[None, :]
            p = tl.load(x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            q = tl.load(x + pairs + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(y + cols[None, :], (p * c - q * s).to(y.dtype.element_ty), mask=mask)
            tl.store(y + pairs + cols[None, :], (q * c + p * s).to(y.dtype.element_ty), mask=mask)
    if COPY:
        for start in range(2 * pairs, D, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = inside & (cols < D)[None, :]
            tl.store(y + cols[None, :], tl.load(x + cols[None, :], mask=mask), mask=mask)
