"""Decode attention: new tokens join the cache, then its parts are attended to, then merged.

A program of `_split_kernel` goes over one part of one sequence's cache for all queries of the heads that
share a key head, padded to the 16 rows of a tensor core.  How many parts there are depends on shapes
alone, so that nothing waits for the lengths; where they begin depends on the sequence's length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tiles
from .activation import tanh
from .launch import fit, launch

__all__ = ["decode_attention_fwd"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(2.0**-126)
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # added and subtracted, it rounds |x| < 2²² to nearest even


def decode_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, key: Tensor | None,
    value: Tensor | None, block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, k_scale: Tensor | None, v_scale: Tensor | None, scale: float, left: int | None,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """out = softmax(scale q kᵀ) v over the cache, after key and value have joined it; lse (B, H, S_q).

    A sequence whose lengths or pages do not fit the cache writes nothing and gives NaN.
    """
    batch, heads, s_q, dim = q.shape
    kv_heads = k_cache.shape[1]
    block_d = fit(dim, 16, 256)
    most = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    length = (0 if key is None else s_q), most if cos is None else min(most, cos.shape[0])
    table_stride = 0 if block_table is None else block_table.stride(0)
    pages = k_cache.shape[0], k_cache.shape[2], block_table, table_stride
    rope = cos, sin, *((0, 0) if cos is None else (cos.stride(0), sin.stride(0)))
    half = 0 if cos is None else cos.shape[1]
    if key is not None and key.numel():
        tokens = fit(s_q, 1, config.DECODE_TOKENS)
        launch(
            _append_kernel, q, (batch * kv_heads * triton.cdiv(s_q, tokens),),
            key, value, k_cache, v_cache, k_scale, v_scale, cache_seqlens, *pages, *rope,
            *key.stride()[:3], *value.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *_strides(k_scale), *_strides(v_scale), kv_heads, s_q, *length,
            half, interleaved, dim, block_d, tokens, warps=config.warps(tokens * block_d),
        )  # fmt: skip
    if not lse.numel():
        return
    rows = heads // kv_heads * s_q
    tile = tiles.find("decode", q, block_d)
    block_m = fit(rows, 16, tile.rows)
    programs = batch * kv_heads * triton.cdiv(rows, block_m)
    splits = min(config.DECODE_SPLITS, triton.cdiv(config.DECODE_PROGRAMS, programs))
    splits = max(1, min(splits, triton.cdiv(most, config.DECODE_STEPS * tile.cols)))
    partial = q.new_empty(splits, batch * heads * s_q, block_d, dtype=torch.float32)
    stats = q.new_empty(2, splits, batch * heads * s_q, dtype=torch.float32)
    launch(
        _split_kernel, q, (programs * splits,),
        q, k_cache, v_cache, k_scale, v_scale, alibi_slopes, cache_seqlens, partial, stats, *pages, *rope,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *_strides(k_scale), *_strides(v_scale),
        *((0, 0) if alibi_slopes is None else alibi_slopes.stride()),
        kv_heads, heads // kv_heads, s_q, batch * heads * s_q, splits, scale, softcap, left or 0, *length,
        left is not None, softcap > 0, half, interleaved, dim, block_d, block_m, tile.cols,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    launch(
        _merge_kernel, q, (batch * heads * s_q,),
        partial, stats, sinks, cache_seqlens, out, lse, *out.stride()[:3], heads, s_q, splits, left or 0,
        *length, left is not None, dim, block_d, tile.cols, fit(splits, 1, config.DECODE_SPLITS), warps=4,
    )  # fmt: skip


def _strides(scale: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scale is None else scale.stride()


@triton.jit
def _length(seqlens, b, new, most):
    """Tokens of sequence b with the new ones, or -1 if they do not fit."""
    before = tl.load(seqlens + b)
    return tl.where((before >= 0) & (before + new <= most), before + new, -1).to(tl.int32)


@triton.jit
def _place(b, positions, mask, pages, table, table_b, PAGE: tl.constexpr):
    """(page, row of it, whether there is such a page), 64 bits; without a table, page b is sequence b."""
    if table is not None:
        page = tl.load(table + b * table_b + positions // PAGE, mask=mask, other=0).to(tl.int64)
        return page, (positions % PAGE).to(tl.int64), (page >= 0) & (page < pages)
    else:
        return b + tl.zeros_like(positions), positions.to(tl.int64), positions >= 0


@triton.jit
def _rotated(
    x, mask, positions, cos, sin, cos_s, sin_s,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows at the addresses x (N, 1), as float32 (N, BLOCK_D), rotated by their positions (N, 1)."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    values = tl.load(x + dims, mask=mask & (dims < DIM), other=0.0).to(tl.float32)
    if HALF > 0:
        if INTERLEAVED:
            first = dims % 2 == 0
            partner, angle = dims ^ 1, dims // 2
        else:
            first = dims < HALF
            partner, angle = tl.where(first, dims + HALF, dims - HALF), tl.where(first, dims, dims - HALF)
        turns = mask & (dims < 2 * HALF)
        others = tl.load(x + partner, mask=turns, other=0.0).to(tl.float32)
        at = tl.maximum(positions, 0).to(tl.int64)
        c = tl.load(cos + at * cos_s + angle, mask=turns, other=1.0)
        s = tl.load(sin + at * sin_s + angle, mask=turns, other=0.0)
        values = values * c + tl.where(first, -others, others) * s
    return values


@triton.jit
def _write(values, to, scale, ok, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (N, BLOCK_D) to the addresses `to` (N, 1); int8 is x / scale with scale = max|x| / 127."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    if scale is not None:
        largest = tl.max(tl.where(values == values, tl.abs(values), float("inf")), 1, keep_dims=True)
        row_scale = tl.div_rn(largest, 127.0)
        tl.store(scale, row_scale, mask=ok)
        values = tl.div_rn(values, tl.maximum(row_scale, _TINY) + tl.zeros_like(values))
        values = (values + _TO_INTEGER) - _TO_INTEGER
        values = tl.where(values == values, values, 0.0)  # its scale makes NaN of it
    tl.store(to + dims, values.to(to.dtype.element_ty), mask=ok & (dims < DIM))


@triton.jit
def _append_kernel(
    key, value, k_cache, v_cache, k_scale, v_scale, seqlens,
    pages, PAGE: tl.constexpr, table, table_b, cos, sin, cos_s, sin_s,
    key_b, key_h, key_s, value_b, value_h, value_s, k_p, k_h, k_s, v_p, v_h, v_s,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s,
    kv_heads, s_q, new, most,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    index, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(s_q, TOKENS)
    h, b = index // blocks % kv_heads, index // blocks // kv_heads
    i = ((index % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int32)[:, None]
    length = _length(seqlens, b, new, most)
    position = tl.where((i < s_q) & (length >= 0), length - s_q + i, -1)
    ok = position >= 0
    page, row, exists = _place(b, position, ok, pages, table, table_b, PAGE)
    ok = ok & exists
    x = key + b * key_b + h * key_h + i.to(tl.int64) * key_s
    x = _rotated(x, ok, position, cos, sin, cos_s, sin_s, HALF, INTERLEAVED, DIM, BLOCK_D)
    scale = None
    if k_scale is not None:
        scale = k_scale + page * k_scale_p + h * k_scale_h + row * k_scale_s
    _write(x, k_cache + page * k_p + h * k_h + row * k_s, scale, ok, DIM, BLOCK_D)
    x = value + b * value_b + h * value_h + i.to(tl.int64) * value_s
    x = _rotated(x, ok, position, cos, sin, cos_s, sin_s, 0, INTERLEAVED, DIM, BLOCK_D)
    if v_scale is not None:
        scale = v_scale + page * v_scale_p + h * v_scale_h + row * v_scale_s
    _write(x, v_cache + page * v_p + h * v_h + row * v_s, scale, ok, DIM, BLOCK_D)


@triton.jit
def _parts(length, s_q, left, splits, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first position that some query sees, positions of a part, a multiple of BLOCK_N)."""
    first = 0
    if WINDOW:
        first = tl.maximum(0, length - s_q - left)
    part = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_N) * BLOCK_N
    return first, tl.maximum(part, BLOCK_N)


@triton.jit
def _split_kernel(
    q, k_cache, v_cache, k_scale, v_scale, alibi, seqlens, partial, stats,
    pages, PAGE: tl.constexpr, table, table_b, cos, sin, cos_s, sin_s,
    q_b, q_h, q_s, k_p, k_h, k_s, v_p, v_h, v_s,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s, alibi_b, alibi_h,
    kv_heads, group, s_q, total_rows, splits, scale, softcap, left, new, most,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    index = (tl.program_id(0) // splits).to(tl.int64)
    blocks = tl.cdiv(group * s_q, BLOCK_M)
    block, h, b = index % blocks, index // blocks % kv_heads, index // blocks // kv_heads
    length = _length(seqlens, b, new, most)
    first, part = _parts(length, s_q, left, splits, WINDOW, BLOCK_N)
    start, end = first + split * part, tl.minimum(first + (split + 1) * part, length)
    if start >= end:
        return

    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int32)  # of the group's heads, s_q rows each
    real = rows < group * s_q
    head, i = h * group + rows // s_q, rows % s_q
    positions = length - s_q + i
    x = q + b * q_b + head * q_h + i.to(tl.int64) * q_s
    queries = _rotated(
        x[:, None], real[:, None], positions[:, None], cos, sin, cos_s, sin_s, HALF, INTERLEAVED, DIM, BLOCK_D
    ).to(q.dtype.element_ty)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_b + head * alibi_h, mask=real, other=0.0) * _LOG2E

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    dims = tl.arange(0, BLOCK_D)[None, :]
    for step in range(start, end, BLOCK_N):
        cols = step + tl.arange(0, BLOCK_N)
        inside = cols < end
        page, row, exists = _place(b, cols, inside, pages, table, table_b, PAGE)
        inside = inside & exists
        tile = inside[:, None] & (dims < DIM)
        keys = tl.load(k_cache + h * k_h + (page * k_p + row * k_s)[:, None] + dims, mask=tile, other=0)
        s = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee") * scale
        if k_scale is not None:
            at = page * k_scale_p + h * k_scale_h + row * k_scale_s
            s *= tl.load(k_scale + at, mask=inside, other=0.0)[None, :]
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        s *= _LOG2E
        distance = cols[None, :] - positions[:, None]
        if alibi is not None:
            s += slope[:, None] * distance
        seen = (distance <= 0) & (cols < end)[None, :]
        if WINDOW:
            seen = seen & (distance >= -left)
        s = tl.where(seen, s, float("-inf"))
        if table is not None:
            s = tl.where(seen & (exists == 0)[None, :], float("nan"), s)
        above = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # no key seen yet: exp(-inf - 0) is 0
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(v_cache + h * v_h + (page * v_p + row * v_s)[:, None] + dims, mask=tile, other=0)
        if v_scale is not None:
            at = page * v_scale_p + h * v_scale_h + row * v_scale_s
            values = values.to(tl.float32) * tl.load(v_scale + at, mask=inside, other=0.0)[:, None]
        values = values.to(queries.dtype)
        acc = tl.dot(p.to(queries.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = above

    at = split.to(tl.int64) * total_rows + (b * kv_heads * group + head) * s_q + i
    tl.store(stats + at, top, mask=real)
    tl.store(stats + splits.to(tl.int64) * total_rows + at, total, mask=real)
    tl.store(partial + at[:, None] * BLOCK_D + dims, acc, mask=real[:, None])


@triton.jit
def _merge_kernel(
    partial, stats, sinks, seqlens, out, lse, out_b, out_h, out_s, heads, s_q, splits, left, new, most,
    WINDOW: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    total_rows = tl.num_programs(0).to(tl.int64)
    i, h, b = index % s_q, index // s_q % heads, index // s_q // heads
    length = _length(seqlens, b, new, most)
    first, part = _parts(length, s_q, left, splits, WINDOW, BLOCK_N)
    c = tl.arange(0, SPLITS)
    used = first + c * part < length
    at = c.to(tl.int64) * total_rows + index
    tops = tl.load(stats + at, mask=used, other=float("-inf"))
    totals = tl.load(stats + splits * total_rows + at, mask=used, other=0.0)
    top = tl.max(tops, 0)
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h) * _LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    factors = tl.exp2(tops - shift)
    total = tl.sum(totals * factors, 0)
    if sinks is not None:
        total += tl.exp2(sink - shift)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.load(partial + at[:, None] * BLOCK_D + dims[None, :], mask=used[:, None], other=0.0)
    acc = tl.sum(parts * factors[:, None], 0)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    bad = tl.where(length < 0, float("nan"), 0.0)
    to = out + b * out_b + h * out_h + i * out_s + dims
    tl.store(to, (acc / total + bad).to(out.dtype.element_ty), mask=dims < DIM)
    tl.store(lse + index, tl.where(nothing, float("-inf"), (top + tl.log2(total)) * _LN2) + bad)
