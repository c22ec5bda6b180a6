"""Flash attention, forward: keys block by block, a running maximum and sum for each query.

Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .attention_backward import attention_bwd
from .attention_scores import base, head_of, plan, scaled, scores, softmax_exp, tile_ptrs, to_log
from .launch import launch

__all__ = ["attention_bwd", "attention_fwd"]


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, spans: Tensor | None, seed: Tensor | None, diagonal: int, left: int | None,
    right: int | None, scale: float, softcap: float, dropout_p: float,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """out = softmax(scale q kᵀ + mask) v, and the natural log-sum-exp of the scores.

    q, out (B, H, S_q, D); k, v (B, H_kv, S_k, D); mask (B, H, S_q, S_k), bool or float; lse
    (B, H, S_q) float32.  Query i sees keys j ≤ i + causal_offset.  Strides are free, but q, k and v
    have last stride 1.  A row that sees no key gives out 0 and lse -inf.
    """
    batch, heads, s_q, dim = q.shape
    s_k = k.shape[2]
    if not lse.numel():
        return
    block_d, block_m, block_n, kind, run = plan(config.ATTENTION_FWD, q, k, mask)
    causal_offset = None if right is None else diagonal
    launch(
        _forward_kernel, q, (triton.cdiv(s_q, block_m) * batch * heads,),
        q, k, v, mask, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *(mask.stride() if kind else (0,) * 4),
        *out.stride()[:3],
        heads, heads // k.shape[1], s_q, s_k, causal_offset or 0, scaled(scale, kind),
        dim, block_d, block_m, block_n, causal_offset is not None, kind,
        **run,
    )  # fmt: skip


@triton.jit
def _forward_blocks(
    acc, total, top, q, k, v, mask, stride_k, stride_v, stride_mask, rows, s_q, s_k, offset, scale,
    first, last,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys in [first, last); EDGE: some of them are out of sight."""
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        ptrs, inside = tile_ptrs(k, cols, s_k, stride_k, DIM, BLOCK_D, EDGE)
        keys = tl.load(ptrs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if EDGE:
            s = scores(
                s * scale, mask, rows[:, None], cols[None, :], stride_mask, s_q, s_k, offset, CAUSAL, KIND
            )
            above = tl.maximum(top, tl.max(s, 1))
        else:
            above = tl.maximum(top, tl.max(s, 1) * scale)
            s = s * scale
        shift = tl.where(above == float("-inf"), 0.0, above)  # no key seen yet: exp(-inf - 0) is 0
        p = softmax_exp(s - shift[:, None], KIND)
        shrink = softmax_exp(top - shift, KIND)
        total = total * shrink + tl.sum(p, 1)
        ptrs, inside = tile_ptrs(v, cols, s_k, stride_v, DIM, BLOCK_D, EDGE)
        values = tl.load(ptrs, mask=inside, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = above
    return acc, total, top


@triton.jit
def _forward_kernel(
    q, k, v, mask, out, lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h, mask_q, mask_k, out_b, out_h, out_s,
    heads, group, s_q, s_k, offset, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(s_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    head, b, h = head_of(tl.program_id(0) // blocks, heads)
    q, out = base(q, b, h, q_b, q_h), base(out, b, h, out_b, out_h)
    k, v = base(k, b, h // group, k_b, k_h), base(v, b, h // group, v_b, v_h)
    if KIND:
        mask = base(mask, b, h, mask_b, mask_h)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if KIND:
        mask += rows.to(tl.int64)[:, None] * mask_q
    ptrs, inside = tile_ptrs(q, rows, s_q, q_s, DIM, BLOCK_D, True)
    sign = tl.where(scale < 0, -1.0, 1.0)  # the maximum of raw scores is scaled: keep the scale positive
    queries = tl.load(ptrs, mask=inside, other=0.0)
    queries = (queries * sign).to(queries.dtype)
    scale *= sign

    last, whole = s_k, s_k  # keys in sight of some row, and of every row
    if CAUSAL:
        last = tl.maximum(0, tl.minimum(s_k, (block + 1) * BLOCK_M + offset))
        whole = tl.maximum(0, tl.minimum(s_k, block * BLOCK_M + offset + 1))
    whole = 0 if KIND else whole // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if not KIND:
        acc, total, top = _forward_blocks(
            acc, total, top, queries, k, v, mask, k_s, v_s, mask_k, rows, s_q, s_k, offset, scale,
            0, whole, DIM, BLOCK_D, BLOCK_N, CAUSAL, KIND, False,
        )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, queries, k, v, mask, k_s, v_s, mask_k, rows, s_q, s_k, offset, scale,
        whole, last, DIM, BLOCK_D, BLOCK_N, CAUSAL, KIND, True,
    )  # fmt: skip

    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    ptrs, inside = tile_ptrs(out, rows, s_q, out_s, DIM, BLOCK_D, True)
    tl.store(ptrs, (acc * share[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * s_q + rows, to_log(top, total, KIND), mask=rows < s_q)
