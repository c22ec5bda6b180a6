"""Flash attention, backward: one kernel for dk and dv, one for dq, so that nothing is added atomically.

Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2: P = exp(S - lse), dS = P ∘ (dP - delta)
with dP = dout vᵀ and delta = rowsum(dout ∘ out) - dlse.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .attention_scores import base, from_log, head_of, plan, scaled, scores, softmax_exp, tile_ptrs
from .launch import fit, launch


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, spans: Tensor | None, seed: Tensor | None, diagonal: int, left: int | None,
    right: int | None, scale: float, softcap: float, dropout_p: float,
    out: Tensor, lse: Tensor, needs: list[bool], dq: Tensor, dk: Tensor, dv: Tensor, dmask: Tensor,
    dsinks: Tensor,
) -> None:  # fmt: skip
    """Gradients of attention_fwd, shaped as q, k and v; dlse (B, H, S_q) may be None.

    dmask is not made: it would be as large as all the scores.
    """
    causal_offset = None if right is None else diagonal
    delta = torch.empty_like(lse)
    if lse.numel():
        _launch_delta(dout, out, dlse, delta)
    if dk.numel() or dv.numel():
        _launch_dkv(dout, q, k, v, mask, lse, delta, causal_offset, scale, dk, dv)
    if dq.numel():
        _launch_dq(dout, q, k, v, mask, lse, delta, causal_offset, scale, dq)


def _launch_delta(dout, out, dlse, delta) -> None:
    batch, heads, s_q, dim = out.shape
    block_d = fit(dim, 16, 256)
    rows = config.ATTENTION_DELTA // block_d
    launch(
        _delta_kernel, out, (triton.cdiv(s_q, rows) * batch * heads,),
        dout, out, dlse, delta, *dout.stride()[:3], *out.stride()[:3],
        *(dlse.stride() if dlse is not None else (0,) * 3), heads, s_q, dim, block_d, rows, warps=4,
    )  # fmt: skip


def _launch_dkv(dout, q, k, v, mask, lse, delta, causal_offset, scale, dk, dv) -> None:
    batch, heads, s_q, dim = q.shape
    heads_kv, s_k = k.shape[1:3]
    block_d, block_m, block_n, kind, run = plan(config.ATTENTION_DKV, q, k, mask)
    like = dk if dk.numel() else dv  # both are laid out alike
    launch(
        _dkv_kernel, q, (triton.cdiv(s_k, block_n) * batch * heads_kv,),
        dout, q, k, v, mask, lse, delta, dk if dk.numel() else None, dv if dv.numel() else None,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(mask.stride() if kind else (0,) * 4), *like.stride()[:3],
        heads_kv, heads // heads_kv, s_q, s_k, causal_offset or 0, scaled(scale, kind), scale,
        dim, block_d, block_m, block_n, causal_offset is not None, kind,
        **run,
    )  # fmt: skip


def _launch_dq(dout, q, k, v, mask, lse, delta, causal_offset, scale, dq) -> None:
    batch, heads, s_q, dim = q.shape
    s_k = k.shape[2]
    block_d, block_m, block_n, kind, run = plan(config.ATTENTION_DQ, q, k, mask)
    launch(
        _dq_kernel, q, (triton.cdiv(s_q, block_m) * batch * heads,),
        dout, q, k, v, mask, lse, delta, dq,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(mask.stride() if kind else (0,) * 4), *dq.stride()[:3],
        heads, heads // k.shape[1], s_q, s_k, causal_offset or 0, scaled(scale, kind), scale,
        dim, block_d, block_m, block_n, causal_offset is not None, kind,
        **run,
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
def _dkv_blocks(
    dk, dv, k, v, dout, q, mask, lse, delta, stride_dout, stride_q, stride_mask_q, stride_mask_k,
    cols, s_q, s_k, offset, scale, first, last,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the queries in [first, last) of one head; EDGE: some of them do not see some of the keys."""
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        ptrs, inside = tile_ptrs(q, rows, s_q, stride_q, DIM, BLOCK_D, True)
        queries = tl.load(ptrs, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
        ptrs, inside = tile_ptrs(dout, rows, s_q, stride_dout, DIM, BLOCK_D, True)
        d = tl.load(ptrs, mask=inside, other=0.0)
        row_lse = from_log(tl.load(lse + rows, mask=rows < s_q, other=0.0), KIND)
        row_delta = tl.load(delta + rows, mask=rows < s_q, other=0.0)
        s = tl.dot(k, tl.trans(queries), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
        if EDGE:
            at = mask
            if KIND:
                at = mask + rows.to(tl.int64)[None, :] * stride_mask_q
            s = scores(s, at, rows[None, :], cols[:, None], stride_mask_k, s_q, s_k, offset, CAUSAL, KIND)
        p = softmax_exp(s - row_lse[None, :], KIND)
        dv = tl.dot(p.to(d.dtype), d, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(d), input_precision="ieee")
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkv_kernel(
    dout, q, k, v, mask, lse, delta, dk_out, dv_out,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, dkv_b, dkv_h, dkv_s,
    heads_kv, group, s_q, s_k, offset, scale, plain_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_k, BLOCK_N)
    block = tl.program_id(0) % blocks
    _, b, h_kv = head_of(tl.program_id(0) // blocks, heads_kv)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs, inside = tile_ptrs(base(k, b, h_kv, k_b, k_h), cols, s_k, k_s, DIM, BLOCK_D, True)
    keys = tl.load(ptrs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
    ptrs, inside = tile_ptrs(base(v, b, h_kv, v_b, v_h), cols, s_k, v_s, DIM, BLOCK_D, True)
    values = tl.load(ptrs, mask=inside, other=0.0)

    first, whole = 0, 0  # queries that see some key of the block, and from where on all see all of it
    if CAUSAL:
        first = tl.maximum(0, block * BLOCK_N - offset) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(0, (block + 1) * BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    if KIND:
        whole = s_q
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        h = h_kv * group + member
        q_head, dout_head = base(q, b, h, q_b, q_h), base(dout, b, h, dout_b, dout_h)
        at = (b * heads_kv * group + h) * s_q
        mask_head = mask
        if KIND:
            mask_head = base(mask, b, h, mask_b, mask_h)
        if CAUSAL or KIND:
            dk, dv = _dkv_blocks(
                dk, dv, keys, values, dout_head, q_head, mask_head, lse + at, delta + at, dout_s, q_s,
                mask_q, mask_k, cols, s_q, s_k, offset, scale, first, tl.minimum(whole, s_q),
                DIM, BLOCK_D, BLOCK_M, CAUSAL, KIND, True,
            )  # fmt: skip
        if not KIND:
            dk, dv = _dkv_blocks(
                dk, dv, keys, values, dout_head, q_head, mask_head, lse + at, delta + at, dout_s, q_s,
                mask_q, mask_k, cols, s_q, s_k, offset, scale, whole, s_q,
                DIM, BLOCK_D, BLOCK_M, CAUSAL, KIND, False,
            )  # fmt: skip
    if dk_out is not None:
        ptrs, inside = tile_ptrs(base(dk_out, b, h_kv, dkv_b, dkv_h), cols, s_k, dkv_s, DIM, BLOCK_D, True)
        tl.store(ptrs, (dk * plain_scale).to(dk_out.dtype.element_ty), mask=inside)
    if dv_out is not None:
        ptrs, inside = tile_ptrs(base(dv_out, b, h_kv, dkv_b, dkv_h), cols, s_k, dkv_s, DIM, BLOCK_D, True)
        tl.store(ptrs, dv.to(dv_out.dtype.element_ty), mask=inside)


@triton.jit
def _dq_blocks(
    dq, q, d, k, v, mask, row_lse, row_delta, stride_k, stride_v, stride_mask,
    rows, s_q, s_k, offset, scale, first, last,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the keys in [first, last); EDGE: some of them are out of sight."""
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        ptrs, inside = tile_ptrs(k, cols, s_k, stride_k, DIM, BLOCK_D, EDGE)
        keys = tl.load(ptrs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
        ptrs, inside = tile_ptrs(v, cols, s_k, stride_v, DIM, BLOCK_D, EDGE)
        values = tl.load(ptrs, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        if EDGE:
            s = scores(s, mask, rows[:, None], cols[None, :], stride_mask, s_q, s_k, offset, CAUSAL, KIND)
        p = softmax_exp(s - row_lse[:, None], KIND)
        dp = tl.dot(d, tl.trans(values), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    dout, q, k, v, mask, lse, delta, dq_out,
    dout_b, dout_h, dout_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    mask_b, mask_h, mask_q, mask_k, dq_b, dq_h, dq_s,
    heads, group, s_q, s_k, offset, scale, plain_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    head, b, h = head_of(tl.program_id(0) // blocks, heads)
    k, v = base(k, b, h // group, k_b, k_h), base(v, b, h // group, v_b, v_h)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if KIND:
        mask = base(mask, b, h, mask_b, mask_h) + rows.to(tl.int64)[:, None] * mask_q
    ptrs, inside = tile_ptrs(base(q, b, h, q_b, q_h), rows, s_q, q_s, DIM, BLOCK_D, True)
    queries = tl.load(ptrs, mask=inside, other=0.0)
    ptrs, inside = tile_ptrs(base(dout, b, h, dout_b, dout_h), rows, s_q, dout_s, DIM, BLOCK_D, True)
    d = tl.load(ptrs, mask=inside, other=0.0)
    row_lse = from_log(tl.load(lse + head * s_q + rows, mask=rows < s_q, other=0.0), KIND)
    row_delta = tl.load(delta + head * s_q + rows, mask=rows < s_q, other=0.0)

    last, whole = s_k, s_k  # keys in sight of some row, and of every row
    if CAUSAL:
        last = tl.maximum(0, tl.minimum(s_k, (block + 1) * BLOCK_M + offset))
        whole = tl.maximum(0, tl.minimum(s_k, block * BLOCK_M + offset + 1))
    whole = 0 if KIND else whole // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if not KIND:
        dq = _dq_blocks(
            dq, queries, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k,
            rows, s_q, s_k, offset, scale, 0, whole, DIM, BLOCK_D, BLOCK_N, CAUSAL, KIND, False,
        )  # fmt: skip
    dq = _dq_blocks(
        dq, queries, d, k, v, mask, row_lse, row_delta, k_s, v_s, mask_k,
        rows, s_q, s_k, offset, scale, whole, last, DIM, BLOCK_D, BLOCK_N, CAUSAL, KIND, True,
    )  # fmt: skip
    ptrs, inside = tile_ptrs(base(dq_out, b, h, dq_b, dq_h), rows, s_q, dq_s, DIM, BLOCK_D, True)
    tl.store(ptrs, (dq * plain_scale).to(dq_out.dtype.element_ty), mask=inside)
