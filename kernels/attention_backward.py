"""Flash attention, backward: one kernel for dk and dv, one for dq, so that nothing is added atomically.

Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2: P = exp(S - lse), dS = P ∘ (dP - delta)
with dP = Z ∘ dout vᵀ, Z the factors of dropout, and delta = rowsum(dout ∘ out) - dlse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .attention_scores import (
    Rules,
    base,
    from_log,
    head_of,
    kept,
    key_range,
    load_rows,
    place_of,
    plan,
    scores,
    slope_of,
    softmax_exp,
    source,
    tile_ptrs,
)  # fmt: skip
from .launch import fit, launch


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, spans: Tensor | None, seed: Tensor | None,
    diagonal: int, left: int | None, right: int | None, scale: float, softcap: float, dropout_p: float,
    out: Tensor, lse: Tensor, needs: list[bool], dq: Tensor, dk: Tensor, dv: Tensor, dmask: Tensor,
    dsinks: Tensor,
) -> None:  # fmt: skip
    """Gradients of attention_fwd, shaped as q, k, v and sinks; dlse (B, H, S_q) may be None.

    dmask is not made: it would be as large as all the scores.
    """
    rules = Rules(mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale, softcap, dropout_p)
    delta = torch.empty_like(lse)
    if lse.numel():
        _launch_delta(dout, out, dlse, delta)
    if dk.numel() or dv.numel():
        _launch_dkv(dout, q, k, v, lse, delta, rules, dk, dv)
    if dq.numel():
        _launch_dq(dout, q, k, v, lse, delta, rules, dq)
    if dsinks.numel():
        dsinks.copy_(-((sinks[:, None] - lse).exp() * delta).sum((0, 2)))


def _launch_delta(dout, out, dlse, delta) -> None:
    batch, heads, s_q, dim = out.shape
    block_d = fit(dim, 16, 256)
    rows = config.ATTENTION_DELTA // block_d
    launch(
        _delta_kernel, out, (triton.cdiv(s_q, rows) * batch * heads,),
        dout, out, dlse, delta, *dout.stride()[:3], *out.stride()[:3],
        *(dlse.stride() if dlse is not None else (0,) * 3), heads, s_q, dim, block_d, rows, warps=4,
    )  # fmt: skip


def _launch_dkv(dout, q, k, v, lse, delta, rules, dk, dv) -> None:
    batch, heads, s_q, dim = q.shape
    heads_kv, s_k = k.shape[1:3]
    p = plan("attention_dkv", q, k, v, rules, q, dout)
    ranges = None if rules.spans is None else _query_ranges(rules, s_q, s_k, p.block_n)
    launch(
        _dkv_kernel, q, (triton.cdiv(s_k, p.block_n) * batch * heads_kv,),
        p.walked(dout, p.block_m, p.block_v), p.walked(q, p.block_m, p.block_d), k, v, lse, delta, ranges,
        dk if dk.numel() else None, dv if dv.numel() else None,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(dk.stride()[:3] if dk.numel() else (0,) * 3), *(dv.stride()[:3] if dv.numel() else (0,) * 3),
        heads_kv, heads // heads_kv, s_q, s_k, *rules.arguments(), rules.scale,
        dim, p.block_d, v.shape[3], p.block_v, p.block_m, p.block_n, rules.kind, p.tma,
        **p.run,
    )  # fmt: skip


def _query_ranges(rules: Rules, s_q: int, s_k: int, block_n: int) -> Tensor:
    """(2, B, blocks of keys): the first query that sees a key of the block, and the end of those."""
    first, end, diagonal = rules.spans.unbind(1)
    place = torch.arange(s_q, device=first.device) + diagonal
    low = first if rules.left is None else torch.clamp(place - rules.left, first, end)
    high = end if rules.right is None else torch.clamp(place + rules.right + 1, first, end)
    keys = torch.arange(0, s_k, block_n, device=first.device).expand(len(first), -1).contiguous()
    ranges = (
        torch.searchsorted(high.contiguous(), keys, right=True),
        torch.searchsorted(low.contiguous(), keys + block_n - 1, right=True),
    )
    return torch.stack(ranges)


def _launch_dq(dout, q, k, v, lse, delta, rules, dq) -> None:
    batch, heads, s_q, dim = q.shape
    p = plan("attention_dq", q, k, v, rules, k, v)
    launch(
        _dq_kernel, q, (triton.cdiv(s_q, p.block_m) * batch * heads,),
        dout, q, p.walked(k, p.block_n, p.block_d), p.walked(v, p.block_n, p.block_v), lse, delta, dq,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3],
        heads, heads // k.shape[1], s_q, k.shape[2], *rules.arguments(), rules.scale,
        dim, p.block_d, v.shape[3], p.block_v, p.block_m, p.block_n, rules.kind, p.tma,
        **p.run,
    )  # fmt: skip


@triton.jit
def _delta_kernel(
    dout, out, dlse, delta, dout_b, dout_h, dout_s, out_b, out_h, out_s, dlse_b, dlse_h, dlse_s,
    heads, s_q, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_q, ROWS)
    head, b, h = head_of(tl.program_id(0) // blocks, heads)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    ptrs, inside = tile_ptrs(base(dout, b, h, dout_b, dout_h), rows, s_q, dout_s, DIM, BLOCK_D, True)
    d = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    ptrs, inside = tile_ptrs(base(out, b, h, out_b, out_h), rows, s_q, out_s, DIM, BLOCK_D, True)
    total = tl.sum(d * tl.load(ptrs, mask=inside, other=0.0).to(tl.float32), 1)
    if dlse is not None:
        ptrs = base(dlse, b, h, dlse_b, dlse_h) + rows.to(tl.int64) * dlse_s
        total -= tl.load(ptrs, mask=rows < s_q, other=0.0)
    tl.store(delta + head * s_q + rows, total, mask=rows < s_q)


@triton.jit
def _differentiate(
    s, dp, lse, delta, bent, softcap, seed, first_row, rows, cols, threshold, factor, KIND: tl.constexpr
):
    """(Z ∘ P, dS) from finished scores and dout vᵀ; rows, and what belongs to them, and cols broadcast."""
    p = softmax_exp(s - lse, KIND)
    dropped = p
    if seed is not None:
        z = kept(tl.load(seed), first_row, rows, cols, threshold, factor)
        dropped = p * z
        dp = dp * z
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1.0 - bent * bent
    return dropped, ds


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, dout, q, mask, lse, delta, spans, span_row, diagonal, slope, seed, dout_s, q_s,
    mask_q, mask_k, cols, first_row, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
    start, stop,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the queries in [start, stop) of one head; EDGE: some of them do not see some of the keys."""
    for at in range(start, stop, BLOCK_M):
        rows = at + tl.arange(0, BLOCK_M)
        queries = load_rows(q, at, s_q, q_s, DIM, BLOCK_D, BLOCK_M, True, TMA)
        d = load_rows(dout, at, s_q, dout_s, DIM_V, BLOCK_V, BLOCK_M, True, TMA)
        row_lse = from_log(tl.load(lse + rows, mask=rows < s_q, other=0.0), KIND)
        row_delta = tl.load(delta + rows, mask=rows < s_q, other=0.0)
        s = tl.dot(k, tl.trans(queries), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
        bent = s
        if EDGE or (softcap is not None) or (slope is not None):
            mask_rows = mask
            if KIND:
                mask_rows = mask + rows.to(tl.int64)[None, :] * mask_q
            place, first, end = place_of(rows[None, :], s_q, spans, span_row, diagonal)
            s, bent = scores(
                s, mask_rows, rows[None, :], cols[:, None], place, first, end, slope, mask_k, s_q, s_k,
                left, right, softcap, unit, spans is not None, KIND, EDGE,
            )  # fmt: skip
        dp = tl.dot(v, tl.trans(d), input_precision="ieee")
        p, ds = _differentiate(
            s, dp, row_lse[None, :], row_delta[None, :], bent, softcap, seed, first_row, rows[None, :],
            cols[:, None], threshold, factor, KIND,
        )  # fmt: skip
        dv = tl.dot(p.to(d.dtype), d, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _query_range(
    block, b, ranges, heads_kv, s_q, s_k, diagonal, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Queries that see a block of keys: (first, start and end of those that see all of it, end)."""
    first, last = 0, s_q
    key, key_end = block * BLOCK_N - diagonal, tl.minimum((block + 1) * BLOCK_N, s_k) - diagonal
    if ranges is not None:
        blocks = tl.cdiv(s_k, BLOCK_N)
        at = ranges + b * blocks + block
        batch = tl.num_programs(0) // (blocks * heads_kv)
        first = tl.load(at).to(tl.int32)
        last = tl.load(at + batch * blocks).to(tl.int32)
    else:
        if right is not None:
            first = tl.minimum(tl.maximum(0, key - right), s_q)
        if left is not None:
            last = tl.minimum(tl.maximum(0, key_end + left), s_q)
    first = first // BLOCK_M * BLOCK_M
    start, stop = first, first
    if (KIND == 0) & (ranges is None):
        if right is not None:
            start = tl.cdiv(tl.maximum(0, (block + 1) * BLOCK_N - 1 - diagonal - right), BLOCK_M) * BLOCK_M
        stop = last
        if left is not None:
            stop = tl.maximum(0, key + left + 1) // BLOCK_M * BLOCK_M
            stop = tl.maximum(start, tl.minimum(stop, last))
    return first, start, stop, last


@triton.jit
def _dkv_kernel(
    dout, q, k, v, lse, delta, ranges, dk_out, dv_out,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads_kv, group, s_q, s_k,
    mask, mask_b, mask_h, mask_q, mask_k, alibi, alibi_b, alibi_h, spans, span_b, span_row,
    seed, diagonal, left, right, scale, softcap, unit, threshold, factor, plain_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_k, BLOCK_N)
    block = tl.program_id(0) % blocks
    _, b, h_kv = head_of(tl.program_id(0) // blocks, heads_kv)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs, inside = tile_ptrs(base(k, b, h_kv, k_b, k_h), cols, s_k, k_s, DIM, BLOCK_D, True)
    keys = tl.load(ptrs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
    ptrs, inside = tile_ptrs(base(v, b, h_kv, v_b, v_h), cols, s_k, v_s, DIM_V, BLOCK_V, True)
    values = tl.load(ptrs, mask=inside, other=0.0)
    if spans is not None:
        spans += b * span_b
    begin, start, stop, last = _query_range(
        block, b, ranges, heads_kv, s_q, s_k, diagonal, left, right, BLOCK_M, BLOCK_N, KIND
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(0, group):
        h = h_kv * group + member
        q_head, dout_head = source(q, b, h, q_b, q_h, TMA), source(dout, b, h, dout_b, dout_h, TMA)
        first_row = (b * heads_kv * group + h) * s_q
        slope = slope_of(alibi, b, h, alibi_b, alibi_h, unit)
        mask_head = mask
        if KIND:
            mask_head = base(mask, b, h, mask_b, mask_h)
        if (right is not None) & (KIND == 0) & (spans is None):
            dk, dv = _dkv_blocks(
                dk, dv, keys, values, dout_head, q_head, mask_head, lse + first_row, delta + first_row,
                spans, span_row, diagonal, slope, seed, dout_s, q_s, mask_q, mask_k, cols, first_row,
                s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
                begin, tl.minimum(start, last), DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_M, KIND, True, TMA,
            )  # fmt: skip
        if (KIND == 0) & (spans is None):
            dk, dv = _dkv_blocks(
                dk, dv, keys, values, dout_head, q_head, mask_head, lse + first_row, delta + first_row,
                spans, span_row, diagonal, slope, seed, dout_s, q_s, mask_q, mask_k, cols, first_row,
                s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
                start, stop, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_M, KIND, False, TMA,
            )  # fmt: skip
        if (left is not None) or (KIND > 0) or (spans is not None):
            dk, dv = _dkv_blocks(
                dk, dv, keys, values, dout_head, q_head, mask_head, lse + first_row, delta + first_row,
                spans, span_row, diagonal, slope, seed, dout_s, q_s, mask_q, mask_k, cols, first_row,
                s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
                stop, last, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_M, KIND, True, TMA,
            )  # fmt: skip
    if dk_out is not None:
        ptrs, inside = tile_ptrs(base(dk_out, b, h_kv, dk_b, dk_h), cols, s_k, dk_s, DIM, BLOCK_D, True)
        tl.store(ptrs, (dk * plain_scale).to(dk_out.dtype.element_ty), mask=inside)
    if dv_out is not None:
        ptrs, inside = tile_ptrs(base(dv_out, b, h_kv, dv_b, dv_h), cols, s_k, dv_s, DIM_V, BLOCK_V, True)
        tl.store(ptrs, dv.to(dv_out.dtype.element_ty), mask=inside)


@triton.jit
def _dq_blocks(
    dq, q, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k, rows, first_row, place, first, end, slope,
    seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor, start, stop,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the keys in [start, stop); EDGE: some of them are out of sight."""
    for at in range(start, stop, BLOCK_N):
        cols = at + tl.arange(0, BLOCK_N)
        keys = load_rows(k, at, s_k, k_s, DIM, BLOCK_D, BLOCK_N, EDGE, TMA)
        values = load_rows(v, at, s_k, v_s, DIM_V, BLOCK_V, BLOCK_N, EDGE, TMA)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        bent = s
        if EDGE or (softcap is not None) or (slope is not None):
            s, bent = scores(
                s, mask, rows[:, None], cols[None, :], place, first, end, slope, mask_k, s_q, s_k,
                left, right, softcap, unit, DOCUMENTS, KIND, EDGE,
            )  # fmt: skip
        dp = tl.dot(d, tl.trans(values), input_precision="ieee")
        _, ds = _differentiate(
            s, dp, row_lse[:, None], row_delta[:, None], bent, softcap, seed, first_row, rows[:, None],
            cols[None, :], threshold, factor, KIND,
        )  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    dout, q, k, v, lse, delta, dq_out,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dq_b, dq_h, dq_s,
    heads, group, s_q, s_k,
    mask, mask_b, mask_h, mask_q, mask_k, alibi, alibi_b, alibi_h, spans, span_b, span_row,
    seed, diagonal, left, right, scale, softcap, unit, threshold, factor, plain_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    head, b, h = head_of(tl.program_id(0) // blocks, heads)
    k, v = source(k, b, h // group, k_b, k_h, TMA), source(v, b, h // group, v_b, v_h, TMA)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if KIND:
        mask = base(mask, b, h, mask_b, mask_h) + rows.to(tl.int64)[:, None] * mask_q
    if spans is not None:
        spans += b * span_b
    slope = slope_of(alibi, b, h, alibi_b, alibi_h, unit)
    place, first, end = place_of(rows[:, None], s_q, spans, span_row, diagonal)
    ptrs, inside = tile_ptrs(base(q, b, h, q_b, q_h), rows, s_q, q_s, DIM, BLOCK_D, True)
    queries = tl.load(ptrs, mask=inside, other=0.0)
    ptrs, inside = tile_ptrs(base(dout, b, h, dout_b, dout_h), rows, s_q, dout_s, DIM_V, BLOCK_V, True)
    d = tl.load(ptrs, mask=inside, other=0.0)
    row_lse = from_log(tl.load(lse + head * s_q + rows, mask=rows < s_q, other=0.0), KIND)
    row_delta = tl.load(delta + head * s_q + rows, mask=rows < s_q, other=0.0)

    begin, start, stop, last = key_range(
        block, s_q, s_k, spans, span_row, diagonal, left, right, BLOCK_M, BLOCK_N, KIND
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if left is not None:
        dq = _dq_blocks(
            dq, queries, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k, rows, head * s_q, place, first,
            end, slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
            begin, tl.minimum(start, last), DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, spans is not None, KIND,
            True, TMA,
        )  # fmt: skip
    if (KIND == 0) & (spans is None):
        dq = _dq_blocks(
            dq, queries, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k, rows, head * s_q, place, first,
            end, slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
            start, stop, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, False, KIND, False, TMA,
        )  # fmt: skip
    dq = _dq_blocks(
        dq, queries, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k, rows, head * s_q, place, first,
        end, slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
        stop, last, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, spans is not None, KIND, True, TMA,
    )  # fmt: skip
    ptrs, inside = tile_ptrs(base(dq_out, b, h, dq_b, dq_h), rows, s_q, dq_s, DIM, BLOCK_D, True)
    tl.store(ptrs, (dq * plain_scale).to(dq_out.dtype.element_ty), mask=inside)
