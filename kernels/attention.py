"""Flash attention, forward: keys block by block, a running maximum and sum for each query.

Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import attention_bwd
from .attention_gluon import attention_fwd_gluon, why_not_gluon
from .attention_scores import (
    Rules,
    base,
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
    to_log,
)  # fmt: skip
from .launch import launch

__all__ = ["attention_bwd", "attention_fwd", "attention_fwd_variant"]


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    spans: Tensor | None, seed: Tensor | None, diagonal: int, left: int | None, right: int | None,
    scale: float, softcap: float, dropout_p: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """out = dropout(softmax(scale q kᵀ + mask)) v, and the natural log-sum-exp of the scores.

    q (B, H, S_q, D); k (B, H_kv, S_k, D), v (B, H_kv, S_k, D_v); out (B, H, S_q, D_v); mask
    (B, H, S_q, S_k), bool or float; lse (B, H, S_q) float32.  Strides are free, but q, k and v have last
    stride 1.  A row that sees no key gives out 0 and lse -inf, or the sink.
    """
    batch, heads, s_q, dim = q.shape
    if not lse.numel():
        return
    rules = Rules(mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale, softcap, dropout_p)
    if why_not_gluon(q, k, v, rules) is None:
        attention_fwd_gluon(q, k, v, rules, out, lse)
        return
    p = plan("attention_fwd", q, k, v, rules, k, v)
    launch(
        _forward_kernel, q, (triton.cdiv(s_q, p.block_m) * batch * heads,),
        q, p.walked(k, p.block_n, p.block_d), p.walked(v, p.block_n, p.block_v), sinks, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, heads // k.shape[1], s_q, k.shape[2], *rules.arguments(),
        dim, p.block_d, v.shape[3], p.block_v, p.block_m, p.block_n, rules.kind, p.tma,
        **p.run,
    )  # fmt: skip


def attention_fwd_variant(q: Tensor, k: Tensor, v: Tensor, *rules) -> str:
    """Which kernel attention_fwd would run, and why not the one for this GPU alone."""
    reason = why_not_gluon(q, k, v, Rules(*rules))
    return "for sm_90, in Gluon" if reason is None else f"for all GPUs; not the one for sm_90: {reason}"


@triton.jit
def _forward_blocks(
    acc, total, top, q, k, v, mask, k_s, v_s, mask_k, rows, first_row, place, first, end, slope, seed,
    s_q, s_k, left, right, scale, softcap, unit, threshold, factor, start, stop,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys in [start, stop); EDGE: some of them are out of sight."""
    for at in range(start, stop, BLOCK_N):
        cols = at + tl.arange(0, BLOCK_N)
        keys = load_rows(k, at, s_k, k_s, DIM, BLOCK_D, BLOCK_N, EDGE, TMA)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if EDGE or (softcap is not None) or (slope is not None):
            s, _ = scores(
                s * scale, mask, rows[:, None], cols[None, :], place, first, end, slope, mask_k, s_q, s_k,
                left, right, softcap, unit, DOCUMENTS, KIND, EDGE,
            )  # fmt: skip
            above = tl.maximum(top, tl.max(s, 1))
        else:
            above = tl.maximum(top, tl.max(s, 1) * scale)
            s = s * scale
        shift = tl.where(above == float("-inf"), 0.0, above)  # no key seen yet: exp(-inf - 0) is 0
        p = softmax_exp(s - shift[:, None], KIND)
        shrink = softmax_exp(top - shift, KIND)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p *= kept(tl.load(seed), first_row, rows[:, None], cols[None, :], threshold, factor)
        values = load_rows(v, at, s_k, v_s, DIM_V, BLOCK_V, BLOCK_N, EDGE, TMA)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = above
    return acc, total, top


@triton.jit
def _forward_kernel(
    q, k, v, sinks, out, lse, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    heads, group, s_q, s_k,
    mask, mask_b, mask_h, mask_q, mask_k, alibi, alibi_b, alibi_h, spans, span_b, span_row,
    seed, diagonal, left, right, scale, softcap, unit, threshold, factor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    head, b, h = head_of(tl.program_id(0) // blocks, heads)
    q, out = base(q, b, h, q_b, q_h), base(out, b, h, out_b, out_h)
    k, v = source(k, b, h // group, k_b, k_h, TMA), source(v, b, h // group, v_b, v_h, TMA)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if KIND:
        mask = base(mask, b, h, mask_b, mask_h) + rows.to(tl.int64)[:, None] * mask_q
    if spans is not None:
        spans += b * span_b
    slope = slope_of(alibi, b, h, alibi_b, alibi_h, unit)
    place, first, end = place_of(rows[:, None], s_q, spans, span_row, diagonal)

    ptrs, inside = tile_ptrs(q, rows, s_q, q_s, DIM, BLOCK_D, True)
    sign = tl.where(scale < 0, -1.0, 1.0)  # the maximum of raw scores is scaled: keep the scale positive
    queries = tl.load(ptrs, mask=inside, other=0.0)
    queries = (queries * sign).to(queries.dtype)
    scale *= sign

    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks is not None:  # a key that is there before all others, with a value of 0
        total += 1.0
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + h) * unit
    begin, start, stop, last = key_range(
        block, s_q, s_k, spans, span_row, diagonal, left, right, BLOCK_M, BLOCK_N, KIND
    )
    if left is not None:
        acc, total, top = _forward_blocks(
            acc, total, top, queries, k, v, mask, k_s, v_s, mask_k, rows, head * s_q, place, first, end,
            slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
            begin, tl.minimum(start, last), DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, spans is not None, KIND,
            True, TMA,
        )  # fmt: skip
    if (KIND == 0) & (spans is None):
        acc, total, top = _forward_blocks(
            acc, total, top, queries, k, v, mask, k_s, v_s, mask_k, rows, head * s_q, place, first, end,
            slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
            start, stop, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, False, KIND, False, TMA,
        )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, queries, k, v, mask, k_s, v_s, mask_k, rows, head * s_q, place, first, end,
        slope, seed, s_q, s_k, left, right, scale, softcap, unit, threshold, factor,
        stop, last, DIM, BLOCK_D, DIM_V, BLOCK_V, BLOCK_N, spans is not None, KIND, True, TMA,
    )  # fmt: skip

    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    ptrs, inside = tile_ptrs(out, rows, s_q, out_s, DIM_V, BLOCK_V, True)
    tl.store(ptrs, (acc * share[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * s_q + rows, to_log(top, total, KIND), mask=rows < s_q)
