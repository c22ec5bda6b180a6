"""Attention: softmax(q kᵀ) v without the score matrix in memory."""

import math

import torch
from torch import Tensor

from . import attention_check as check
from . import attention_samples, philox
from .attention_eager import eager
from .attention_rules import Rules, kept, scores, spans_of_documents, spans_of_sequences, visible_pairs
from .op import Op, autocast, empty, opmath, register
from .sharding import SUM, Split, wanted

MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    document_ids: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, as `torch.nn.functional.scaled_dot_product_attention`.

    A score is scale · q kᵀ, then capped, then biased by ALiBi, then by `attn_mask`.

    Args:
        query: (B, H, S_q, D), any strides; float32, bfloat16, float16 or float64.
        key: (B, H_kv, S_k, D), where H_kv divides H: fewer key heads are shared by groups of query
            heads (grouped-query attention; one is multi-query), without being repeated in memory.
        value: (B, H_kv, S_k, D_v).
        attn_mask: broadcastable to (B, H, S_q, S_k); bool (True takes part) or a float added to the
            scores, in the dtype of `query` or float32.
        dropout_p: each probability becomes 0 with this probability and is divided by 1 - dropout_p
            else.  Forward and backward make the same random numbers; no mask is stored.
        is_causal: query i sees keys up to i; may be combined with everything else.
        scale: factor of the scores; None is 1/sqrt(D).
        enable_gqa: as torch has it, and not needed: heads are shared wherever H_kv < H.
        causal_align: with S_q ≠ S_k, "top_left" puts query i at the place of key i, as torch;
            "bottom_right" at the place of key i + S_k - S_q, as FlashAttention, which is what a KV cache
            needs.  `is_causal`, `window` and `alibi_slopes` count from there.
        window: (left, right), how many keys a query sees beside the one at its own place; -1 is without
            limit.
        softcap: c > 0 makes scores c · tanh(score / c) (Gemma 2, arXiv:2408.00118, sec. 2).
        alibi_slopes: (H,) or (B, H), floating point; slope · distance is taken from the score (Press et
            al. 2022, arXiv:2108.12409, sec. 3).  Without gradient.
        sinks: (H,), floating point: for each head a score that takes part in the softmax and has no
            value (Agarwal et al. 2025, gpt-oss, arXiv:2508.10925, sec. 2.2).
        document_ids: (B, S) integers, S_q = S_k = S: tokens see only those of their own document;
            neighbours with the same number are one document.
        dropout_seed: int64, one element; None draws one from torch's generator.
        return_lse: also return the log-sum-exp of each row of scores, the sink among them.

    Returns:
        out, (B, H, S_q, D_v) in the dtype of `query`, laid out in memory as (B, S_q, H, D_v); with
        `return_lse` the pair (out, lse), lse (B, H, S_q) in float32, before dropout.  A row that sees no
        key gives out 0 and lse -inf, or the sink.  Values at masked positions must be finite.

    Raises:
        ValueError: shapes, dtypes, devices or arguments that do not fit.
    """
    query, key, value = autocast(query, key, value)
    check.check_tensors(query, key, value)
    s_q, s_k = query.shape[2], key.shape[2]
    check.check_numbers(causal_align, window, softcap, dropout_p)
    spans = None
    if document_ids is not None:
        check.check_documents(document_ids, query, s_k)
        spans = spans_of_documents(document_ids)
    diagonal = s_k - s_q if causal_align == "bottom_right" else 0
    out, lse = _apply(
        query, key, value, attn_mask, alibi_slopes, sinks, spans, diagonal, window, is_causal, scale, softcap,
        dropout_p, dropout_seed,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_align: str = "bottom_right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences of any lengths, packed one behind the other without padding.

    As `flash_attn_varlen_func` and `torch.nn.attention.varlen.varlen_attn`; the longest length need not be
    known.  What is not named here is as in `attention`.

    Args:
        query: (T_q, H, D): the queries of all sequences.
        key, value: (T_k, H_kv, D) and (T_k, H_kv, D_v).
        cu_seqlens_q: (N + 1,), int32 or int64, ascending from 0: queries of sequence n are
            cu_seqlens_q[n] .. cu_seqlens_q[n + 1] - 1; a sequence may be empty.  Queries behind the last
            sequence see no key.
        cu_seqlens_k: the same for the keys; None is `cu_seqlens_q`.
        causal_align: "bottom_right", as FlashAttention has it, or "top_left", within each sequence.
        alibi_slopes: (H,).

    Returns:
        out, (T_q, H, D_v); with `return_lse` also lse, (H, T_q).

    Raises:
        ValueError: what does not fit.  On a GPU the numbers in cu_seqlens are not looked at.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check.check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k)
    query, key, value = (t.transpose(0, 1)[None] for t in autocast(query, key, value))
    check.check_tensors(query, key, value)
    check.check_numbers(causal_align, window, softcap, dropout_p)
    spans = spans_of_sequences(cu_seqlens_q, cu_seqlens_k, query.shape[2], causal_align)
    out, lse = _apply(
        query, key, value, None, alibi_slopes, sinks, spans, 0, window, is_causal, scale, softcap, dropout_p,
        dropout_seed,
    )  # fmt: skip
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _apply(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    spans: Tensor | None, diagonal: int, window: tuple[int, int] | None, is_causal: bool,
    scale: float | None, softcap: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on checked tensors."""
    batch, heads, s_q, dim = q.shape
    f = opmath(q.dtype)
    if mask is not None:
        check.check_mask(mask, q, k.shape[2])
        mask = mask.expand(batch, heads, s_q, k.shape[2])
    if alibi_slopes is not None:
        check.check_heads("alibi_slopes", alibi_slopes, q, (heads,), (batch, heads))
        alibi_slopes = alibi_slopes.detach().to(f).expand(batch, heads)
    if sinks is not None:
        check.check_heads("sinks", sinks, q, (heads,))
        sinks = sinks.to(f).contiguous()
    left, right = (None if side == -1 else int(side) for side in window or (-1, -1))
    return ATTENTION.apply(
        _rows(q), _rows(k), _rows(v), mask, alibi_slopes, sinks, spans,
        philox.new_seed(q, seed) if dropout_p else None, diagonal, left, 0 if is_causal else right,
        1 / math.sqrt(dim) if scale is None else float(scale), float(softcap), float(dropout_p),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@register
class ATTENTION(Op):
    """out = dropout(softmax(scale · q kᵀ + mask)) v,  lse = logsumexp(scale · q kᵀ + mask)

    The fast kernels go over the keys block by block and keep a running maximum and sum for each
    query row, so neither direction stores the (S_q, S_k) scores.  Backward makes the probabilities
    again from lse: P = exp(S - lse), dS = P ∘ (Z ∘ dout vᵀ - rowsum(dout ∘ out) + dlse), with the factors
    Z of dropout.
    """

    name = "attention"
    family = "attention"
    batched = ("query", "key", "value")
    lowers = True
    source = (
        "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, eq. 1; "
        "Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2"
    )
    results = 2  # out and lse
    constant = ("alibi_slopes",)
    gradients = {"q": 0, "k": 1, "v": 2, "mask": 3, "sinks": 4}
    public = staticmethod(attention)
    eager = staticmethod(eager)
    samples = staticmethod(attention_samples.samples)
    benchmarks = staticmethod(attention_samples.benchmarks)
    variants = staticmethod(attention_samples.variants)
    draw = staticmethod(attention_samples.draw)

    @staticmethod
    def reference(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
        sinks: Tensor | None, spans: Tensor | None, seed: Tensor | None, diagonal: int, left: int | None,
        right: int | None, scale: float, softcap: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rules = Rules(
            mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale, softcap, dropout_p
        )
        s, _ = scores(q, k, rules)  # (B, H_kv, G, S_q, S_k)
        lse = s.logsumexp(-1)  # (B, H_kv, G, S_q)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.view(k.shape[1], -1, 1))
        p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        keep = kept(q, k, rules)
        out = ((p if keep is None else p * keep) @ v.to(s.dtype)[:, :, None]).flatten(
            1, 2
        )  # (B, H, S_q, D_v)
        return _token_major(out.to(q.dtype)), lse.flatten(1, 2)

    @staticmethod
    def outputs(q, k, v, *rules):
        batch, heads, s_q, _ = q.shape
        out = q.new_empty(batch, s_q, heads, v.shape[3]).transpose(1, 2)
        return out, q.new_empty(batch, heads, s_q, dtype=opmath(q.dtype))

    @staticmethod
    def save(args, outs):
        return *args, *outs

    @staticmethod
    def replay(*saved):
        return saved[:-2]

    @staticmethod
    def prepare_grad(grad):
        return _rows(grad)

    @staticmethod
    def reference_bwd(
        dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, spans: Tensor | None, seed: Tensor | None,
        diagonal: int, left: int | None, right: int | None, scale: float, softcap: float, dropout_p: float,
        out: Tensor, lse: Tensor, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        rules = Rules(
            mask, alibi_slopes, sinks, spans, seed, diagonal, left, right, scale, softcap, dropout_p
        )
        f = opmath(q.dtype)
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        s, slope = scores(q, k, rules)  # (B, H_kv, G, S_q, S_k)
        p = (s - lse.masked_fill(lse == -math.inf, 0.0).unflatten(1, groups)[..., None]).exp()
        do = dout.to(f).unflatten(1, groups)  # (B, H_kv, G, S_q, D_v)
        delta = (dout.to(f) * out.to(f)).sum(-1)  # (B, H, S_q)
        if dlse is not None:
            delta = delta - dlse
        keep = kept(q, k, rules)
        dp = do @ v.to(f)[:, :, None].transpose(-1, -2)
        ds = p * ((dp if keep is None else dp * keep) - delta.unflatten(1, groups)[..., None])
        dmask = ds.flatten(1, 2).to(mask.dtype) if needs[3] else empty(q)
        dsinks = -((sinks[:, None] - lse).exp() * delta).sum((0, 2)) if needs[4] else empty(lse)
        ds = ds if slope is None else ds * slope
        dq = scale * (ds @ k.to(f)[:, :, None]).flatten(1, 2)
        dk = scale * (ds.transpose(-1, -2) @ q.to(f).unflatten(1, groups)).sum(2)
        dv = ((p if keep is None else p * keep).transpose(-1, -2) @ do).sum(2)
        grads = [_token_major(g.to(q.dtype)) if need else empty(q) for g, need in zip((dq, dk, dv), needs)]
        return *grads, dmask, dsinks

    @staticmethod
    def outputs_bwd(dout, dlse, q, k, v, mask, alibi_slopes, sinks, *others):
        _, lse, needs = others[-3:]
        grads = [_token_major(t, copy=False) if need else empty(q) for t, need in zip((q, k, v), needs)]
        dmask = torch.empty_like(mask, memory_format=torch.contiguous_format) if needs[3] else empty(q)
        return *grads, dmask, torch.empty_like(sinks) if needs[4] else empty(lse)

    @staticmethod
    def refuse(backend, q, k, v, *rules):
        if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
            dim = max(q.shape[-1], v.shape[-1])
            return f"the head dim is {dim}, the fast kernels take 1 to {MAX_HEAD_DIM}"
        return None

    @staticmethod
    def refuse_bwd(backend, dout, dlse, q, k, v, *others):
        if others[-1][3]:
            return "attn_mask needs a gradient, which is as large as the whole score matrix"
        return ATTENTION.refuse(backend, q, k, v)

    @staticmethod
    def splits(half, args):
        """By sequences or by heads; dropout counts in whole tensors, so with it every device has all."""
        if args["seed"] is not None:
            return
        heads = dict.fromkeys(("q", "k", "v", "mask", "alibi_slopes", "dout", "dlse", "out", "lse"), 1)
        batch = {**dict.fromkeys(heads, 0), "spans": 0}
        heads["sinks"] = 0
        mesh = args["k"].mesh
        even = all(args["k"].shape[1] % mesh.size(i) == 0 for i in range(mesh.ndim))  # groups stay whole
        if half == "fwd":
            yield Split(batch, (0, 0))
            if even:
                yield Split(heads, (1, 1))
        else:
            needs = args["needs"]
            yield Split(batch, tuple(wanted(n, w) for n, w in zip(needs, (0, 0, 0, 0, SUM))))
            if even:
                yield Split(heads, tuple(wanted(n, w) for n, w in zip(needs, (1, 1, 1, 1, 0))))

    @staticmethod
    def flops(q, k, v, *rules):
        """2 FLOPs for each element of a key and of a value, for each (query, key) pair that is visible."""
        return 2 * q.shape[1] * (q.shape[3] + v.shape[3]) * visible_pairs(q, k, Rules(*rules))

    @staticmethod
    def flops_bwd(dout, dlse, q, k, v, *others):
        """Five matrix products for forward's two (FlashAttention-2, sec. 4.1)."""
        width = 3 * q.shape[3] + 2 * v.shape[3]
        return 2 * q.shape[1] * width * visible_pairs(q, k, Rules(*others[:-3]))

    @staticmethod
    def condition(query, key, value, *args, scale=None, **kwargs) -> float:
        """The largest |q||k| scale: how far one rounding of the scores can move an exponential."""
        if not query.numel() or not key.numel():
            return 0.0
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
        norms = (t.detach().norm(dim=-1).max() for t in (query, key))
        return float(math.prod(norms) * scale)


def _token_major(x: Tensor, copy: bool = True) -> Tensor:
    """(B, H, S, D) laid out in memory as (B, S, H, D), where merging the heads is free."""
    batch, heads, length, dim = x.shape
    out = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return out.copy_(x) if copy else out
