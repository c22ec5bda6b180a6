"""Attention: softmax(q kᵀ) v without the score matrix in memory."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast, empty, opmath, register

MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, S_q, D), any strides; float32, bfloat16, float16 or float64.
        key: (B, H_kv, S_k, D), where H_kv divides H: fewer key heads are shared by groups of query
            heads (grouped-query attention; one is multi-query), without being repeated in memory.
        value: (B, H_kv, S_k, D).
        attn_mask: broadcastable to (B, H, S_q, S_k); bool (True takes part) or a float added to the
            scores, in the dtype of `query` or float32.
        is_causal: query i sees keys up to i; may be combined with `attn_mask`.
        scale: factor of the scores; None is 1/sqrt(D).
        causal_align: with S_q ≠ S_k, "top_left" lets query i see keys j ≤ i, as torch; "bottom_right"
            lets it see j ≤ i + S_k - S_q, as FlashAttention, which is what a KV cache needs.
        return_lse: also return the log-sum-exp of each row of scores.

    Returns:
        out, (B, H, S_q, D) in the dtype of `query`, laid out in memory as (B, S_q, H, D); with
        `return_lse` the pair (out, lse), lse (B, H, S_q) in float32.  A row that sees no key gives
        out 0 and lse -inf.  Values at masked positions must be finite.

    Raises:
        ValueError: shapes, dtypes, devices or arguments that do not fit.
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value, attn_mask, causal_align)
    batch, heads, s_q, dim = query.shape
    s_k = key.shape[2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, s_q, s_k)
    offset = None
    if is_causal:
        offset = 0 if causal_align == "top_left" else s_k - s_q
    scale = 1 / math.sqrt(dim) if scale is None else float(scale)
    out, lse = ATTENTION.apply(_rows(query), _rows(key), _rows(value), attn_mask, offset, scale)
    return (out, lse) if return_lse else out


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, align: str) -> None:
    if align not in ("top_left", "bottom_right"):
        raise ValueError(f"attention: causal_align is {align!r}, expected 'top_left' or 'bottom_right'")
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dim() != 4:
            raise ValueError(
                f"attention: {name} has shape {tuple(t.shape)}, expected 4 dimensions "
                "(batch, heads, length, head dim)"
            )
        if not t.is_floating_point() or t.dtype != q.dtype:
            raise ValueError(
                f"attention: {name} is {t.dtype}, expected query, key and value of one floating-point dtype "
                f"(query is {q.dtype})"
            )
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, expected {q.device} as query")
    if k.shape != v.shape:
        raise ValueError(f"attention: value has shape {tuple(v.shape)}, expected {tuple(k.shape)} as key")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: key has shape {tuple(k.shape)}, expected batch {q.shape[0]} and "
            f"head dim {q.shape[3]} as query"
        )
    if q.shape[3] == 0:
        raise ValueError("attention: query has head dim 0, expected at least 1")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: key has {k.shape[1]} heads, expected a number that divides the query's {q.shape[1]}"
        )
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(
            f"attention: attn_mask is {mask.dtype}, expected torch.bool, {q.dtype} or torch.float32"
        )
    if mask.device != q.device:
        raise ValueError(f"attention: attn_mask is on {mask.device}, expected {q.device} as query")
    full = (*q.shape[:3], k.shape[2])
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) != 4 or any(m not in (1, f) for m, f in zip(padded, full)):
        raise ValueError(
            f"attention: attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}"
        )


@register
class ATTENTION(Op):
    """out = softmax(scale · q kᵀ + mask) v,  lse = logsumexp(scale · q kᵀ + mask)

    The fast kernels go over the keys block by block and keep a running maximum and sum for each
    query row, so neither direction stores the (S_q, S_k) scores.  Backward makes the probabilities
    again from lse: P = exp(S - lse), dS = P ∘ (dout vᵀ - rowsum(dout ∘ out) + dlse).
    """

    name = "attention"
    family = "attention"
    lowers = True
    source = (
        "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, eq. 1; "
        "Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2"
    )
    results = 2  # out and lse
    gradients = {"q": 0, "k": 1, "v": 2, "mask": 3}
    public = staticmethod(attention)

    @staticmethod
    def reference(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal_offset: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        f = opmath(q.dtype)
        s = _scores(q, k, mask, causal_offset, scale)  # (B, H_kv, G, S_q, S_k)
        lse = s.logsumexp(-1)  # (B, H_kv, G, S_q)
        p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        out = (p @ v.to(f)[:, :, None]).flatten(1, 2)  # (B, H, S_q, D)
        return _token_major(out.to(q.dtype)), lse.flatten(1, 2)

    @staticmethod
    def outputs(q, k, v, mask, causal_offset, scale):
        batch, heads, s_q, dim = q.shape
        out = q.new_empty(batch, s_q, heads, dim).transpose(1, 2)
        return out, q.new_empty(batch, heads, s_q, dtype=opmath(q.dtype))

    @staticmethod
    def save(args, outs):
        q, k, v, mask, causal_offset, scale = args
        return q, k, v, mask, outs[0], outs[1], causal_offset, scale

    @staticmethod
    def replay(q, k, v, mask, out, lse, causal_offset, scale):
        return q, k, v, mask, causal_offset, scale

    @staticmethod
    def prepare_grad(grad):
        return _rows(grad)

    @staticmethod
    def reference_bwd(
        dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        out: Tensor, lse: Tensor, causal_offset: int | None, scale: float, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        f = opmath(q.dtype)
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        s = _scores(q, k, mask, causal_offset, scale)  # (B, H_kv, G, S_q, S_k)
        lse = lse.masked_fill(lse == -math.inf, 0.0).unflatten(1, groups)
        p = (s - lse[..., None]).exp()
        do = dout.to(f).unflatten(1, groups)  # (B, H_kv, G, S_q, D)
        delta = (dout.to(f) * out.to(f)).sum(-1)  # (B, H, S_q)
        if dlse is not None:
            delta = delta - dlse
        ds = p * (do @ v.to(f)[:, :, None].transpose(-1, -2) - delta.unflatten(1, groups)[..., None])
        dq = scale * (ds @ k.to(f)[:, :, None]).flatten(1, 2)
        dk = scale * (ds.transpose(-1, -2) @ q.to(f).unflatten(1, groups)).sum(2)
        dv = (p.transpose(-1, -2) @ do).sum(2)
        grads = [_token_major(g.to(q.dtype)) if need else empty(q) for g, need in zip((dq, dk, dv), needs)]
        dmask = ds.flatten(1, 2).to(mask.dtype) if needs[3] else empty(q)
        return grads[0], grads[1], grads[2], dmask

    @staticmethod
    def outputs_bwd(dout, dlse, q, k, v, mask, out, lse, causal_offset, scale, needs):
        grads = [_token_major(t, copy=False) if need else empty(q) for t, need in zip((q, k, v), needs)]
        dmask = torch.empty_like(mask, memory_format=torch.contiguous_format) if needs[3] else empty(q)
        return grads[0], grads[1], grads[2], dmask

    @staticmethod
    def refuse(backend, q, k, v, mask, causal_offset, scale):
        if q.shape[-1] > MAX_HEAD_DIM:
            return f"the head dim is {q.shape[-1]}, the fast kernels take 1 to {MAX_HEAD_DIM}"
        return None

    @staticmethod
    def refuse_bwd(backend, dout, dlse, q, k, v, mask, out, lse, causal_offset, scale, needs):
        if needs[3]:
            return "attn_mask needs a gradient, which is as large as the whole score matrix"
        return ATTENTION.refuse(backend, q, k, v, mask, causal_offset, scale)

    @staticmethod
    def flops(q, k, v, mask, causal_offset, scale):
        """4 FLOPs for each of the D elements of each (query, key) pair that is visible."""
        batch, heads, s_q, dim = q.shape
        return 4 * batch * heads * dim * visible_pairs(s_q, k.shape[2], causal_offset)

    @staticmethod
    def flops_bwd(dout, dlse, q, k, v, mask, out, lse, causal_offset, scale, needs):
        """Five matrix products for forward's two (FlashAttention-2, sec. 4.1)."""
        return 2.5 * ATTENTION.flops(q, k, v, mask, causal_offset, scale)

    @staticmethod
    def eager(
        query,
        key,
        value,
        attn_mask=None,
        is_causal=False,
        scale=None,
        *,
        causal_align="top_left",
        return_lse=False,
    ):
        if is_causal and (attn_mask is not None or causal_align == "bottom_right"):
            s_q, s_k = query.shape[2], key.shape[2]
            offset = s_k - s_q if causal_align == "bottom_right" else 0
            causal = torch.ones(s_q, s_k, dtype=torch.bool, device=query.device).tril(offset)
            if attn_mask is None:
                attn_mask = causal
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & causal
            else:
                attn_mask = attn_mask.masked_fill(~causal, -math.inf)
            is_causal = False
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            0.0,
            is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if not return_lse:
            return out
        f = opmath(query.dtype)
        mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return out, _scores(query.to(f), key.to(f), mask, 0 if is_causal else None, scale).logsumexp(
            -1
        ).flatten(1, 2)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        def qkv(b, h, s_q, d, h_kv=None, s_k=None):
            h_kv, s_k = h_kv or h, s_q if s_k is None else s_k
            return make(b, h, s_q, d), make(b, h_kv, s_k, d), make(b, h_kv, s_k, d)

        causal = {"is_causal": True}
        right = {"is_causal": True, "causal_align": "bottom_right"}
        yield Sample("2x3x64x64", qkv(2, 3, 64, 64), {})
        yield Sample("causal", qkv(1, 2, 100, 64), causal)
        yield Sample("causal, prime sizes", qkv(1, 3, 67, 37), causal)
        yield Sample("head dim 1", qkv(1, 1, 5, 1), causal)
        yield Sample("head dim 128", qkv(1, 2, 70, 128), causal)
        yield Sample("head dim 256", qkv(1, 1, 33, 256), causal)
        yield Sample("length 1", qkv(3, 2, 1, 16), {})
        yield Sample("GQA", qkv(2, 6, 40, 32, h_kv=2), causal)
        yield Sample("MQA", qkv(1, 4, 35, 16, h_kv=1), {})
        yield Sample("cross", qkv(1, 2, 19, 32, s_k=83), {})
        yield Sample("more keys, top left", qkv(1, 2, 19, 32, s_k=83), causal)
        yield Sample("more keys, bottom right", qkv(1, 2, 19, 32, s_k=83), right)
        yield Sample("fewer keys, top left", qkv(1, 2, 83, 32, s_k=19), causal)
        yield Sample("fewer keys, bottom right", qkv(1, 2, 83, 32, s_k=19), right)
        yield Sample("one query", qkv(2, 4, 1, 64, h_kv=2, s_k=130), right)
        yield Sample("scale", qkv(1, 2, 20, 24), {"scale": 0.7})
        yield Sample("scale 0", qkv(1, 1, 20, 24), {"scale": 0.0})
        padding = make.integers(2, 3, 1, 1, 50) == 1
        yield Sample("padding mask", qkv(3, 2, 50, 32), {"attn_mask": padding})
        full = make.integers(2, 2, 2, 33, 45) == 1
        yield Sample("bool mask", qkv(2, 2, 33, 32, s_k=45), {"attn_mask": full})
        yield Sample("float mask", qkv(1, 2, 33, 32), {"attn_mask": make(33, 33)})
        infinite = torch.zeros(33, 40).masked_fill(make.integers(2, 33, 40).cpu() == 1, -math.inf)
        infinite = infinite.to(make.device, make.dtype)
        yield Sample("-inf mask, GQA", qkv(1, 4, 33, 16, h_kv=2, s_k=40), {"attn_mask": infinite})
        yield Sample("mask and causal", qkv(3, 2, 50, 32), {"attn_mask": padding, "is_causal": True})
        nothing = torch.zeros(4, 9, dtype=torch.bool, device=make.device)
        yield Sample("all masked", qkv(1, 2, 4, 16, s_k=9), {"attn_mask": nothing})
        yield Sample("no keys", qkv(1, 2, 4, 16, s_k=0), {})
        yield Sample("no queries", qkv(1, 2, 0, 16, s_k=7), {})
        yield Sample("empty batch", qkv(0, 2, 5, 16), causal)
        packed = make(2, 21, 3, 4, 32)  # (B, S, 3, H, D), as a fused projection gives
        yield Sample("packed qkv", tuple(packed.permute(2, 0, 3, 1, 4)), causal)
        yield Sample("last stride 2", tuple(make(1, 2, 17, 48)[..., ::2] for _ in range(3)), causal)
        shared = make(1, 2, 9, 16)
        yield Sample(
            "shared heads", tuple(t.expand(1, 2, 9, 16) for t in (shared, shared[:, :1], shared[:, :1])), {}
        )
        yield Sample("large scores", tuple(10 * t for t in qkv(1, 2, 40, 64)), causal)

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for b, h, s, d in ((8, 6, 256, 64), (4, 12, 1024, 64), (1, 12, 2048, 64), (1, 8, 2048, 128)):
            qkv = make(b, s, 3, h, d).permute(2, 0, 3, 1, 4)
            yield Sample(f"{b}x{h}x{s}x{d} causal", tuple(qkv), {"is_causal": True})

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        for dim in (16, 32, 256):
            qkv = tuple(make(2, heads, 1024, dim) for heads in (4, 2, 2))
            yield Sample(f"head dim {dim}, causal", qkv, {"is_causal": True})
        for dim in (64, 128, 256):
            qkv = tuple(make(2, 4, 1024, dim) for _ in range(3))
            yield Sample(f"head dim {dim}, float mask", qkv, {"attn_mask": make(1024, 1024)})
        qkv = tuple(make(2, 4, 1024, 64) for _ in range(3))
        yield Sample("not causal", qkv, {})
        yield Sample("bool mask", qkv, {"attn_mask": make.integers(2, 2, 1, 1, 1024) == 1})

    @staticmethod
    def condition(query, key, value, attn_mask=None, is_causal=False, scale=None, **kwargs) -> float:
        """The largest |q||k| scale: how far one rounding of the scores can move an exponential."""
        if not query.numel() or not key.numel():
            return 0.0
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
        norms = (t.detach().norm(dim=-1).max() for t in (query, key))
        return float(math.prod(norms) * scale)


def visible_pairs(s_q: int, s_k: int, causal_offset: int | None) -> int:
    """How many (query, key) pairs take part: query i sees keys j ≤ i + causal_offset."""
    if causal_offset is None:
        return s_q * s_k
    first, last = causal_offset + 1, causal_offset + s_q  # keys seen by the first and the last query
    a, b = max(1, 1 - causal_offset), min(s_q, s_k - causal_offset)  # queries whose count grows, 1-based
    growing = (b - a + 1) * (a + b + 2 * causal_offset) // 2 if b >= a else 0
    full = s_k * max(0, s_q - max(0, s_k - causal_offset)) if last > s_k else 0
    return growing + min(full, s_q * s_k) if first <= s_k else s_q * s_k


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal_offset: int | None, scale: float) -> Tensor:
    """scale · q kᵀ + mask, (B, H_kv, G, S_q, S_k): the G query heads of a group share a key head."""
    f = opmath(q.dtype)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    s = scale * (q.to(f).unflatten(1, groups) @ k.to(f)[:, :, None].transpose(-1, -2))
    if causal_offset is not None:
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        s = s.masked_fill(j > i + causal_offset, -math.inf)
    if mask is None:
        return s
    mask = mask.unflatten(1, groups)
    return s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask


def _token_major(x: Tensor, copy: bool = True) -> Tensor:
    """(B, H, S, D) laid out in memory as (B, S, H, D), where merging the heads is free."""
    batch, heads, length, dim = x.shape
    out = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return out.copy_(x) if copy else out
