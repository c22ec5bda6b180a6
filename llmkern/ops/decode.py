"""Decode attention: one or a few new tokens against a key-value cache."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decode_cache as cache
from . import decode_samples
from .op import Make, Op, Sample, opmath, register
from .sharding import Split

MAX_HEAD_DIM = 256  # of the Triton kernel


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens on a cache, which they may join first; for inference, without gradients.

    The cache of sequence b holds cache_seqlens[b] tokens.  With `key` and `value` the S_q new ones are
    written behind them, rotated, and query i has position cache_seqlens[b] + i; without, the queries
    belong to the last S_q tokens of the cache.  A query sees its own position and those before it.
    What lies in the cache behind them is never read.

    Args:
        query: (B, H, S_q, D), any strides; float32, bfloat16, float16 or float64.
        k_cache, v_cache: (B, H_kv, S_max, D), where H_kv divides H, or with `block_table` pages
            (num_blocks, H_kv, block_size, D); the dtype of `query`, or int8 with `k_scale` and `v_scale`.
            Written in place.  Any strides, but the kernels want the last to be 1.
        cache_seqlens: (B,), int32 or int64; not advanced by this function.
        key, value: (B, H_kv, S_q, D), the new tokens.
        block_table: (B, max_blocks), int32; page block_table[b, j] has positions j · block_size and on.
        cos, sin: (positions, R / 2), float32; the first R elements of query and key are rotated (RoPE).
        interleaved: rotate neighbours, as GPT-J, in place of the two halves, as GPT-NeoX and Llama.
        k_scale, v_scale: (B, H_kv, S_max) or (num_blocks, H_kv, block_size), float32; an int8 element
            times the scale of its token and head is its value.  Written in place.
        scale: factor of the scores; None is 1/sqrt(D).
        window: (left, right), how far a query sees; -1 is without limit.  No query sees to the right of
            itself, so only `left` matters.
        softcap: c > 0 makes scores c · tanh(score / c).
        alibi_slopes: (H,) or (B, H); slope · (j - position of the query) is added to the score of key j.
        sinks: (H,), for each head a score that takes part in the softmax and has no value.
        return_lse: also return the log-sum-exp of each row of scores, the sink among them.

    Returns:
        out, (B, H, S_q, D) in the dtype of `query`, laid out in memory as (B, S_q, H, D); with
        `return_lse` the pair (out, lse), lse (B, H, S_q) in float32.  A query that sees no key gives
        out 0 and lse -inf.

    Raises:
        ValueError: what does not fit.  Lengths and pages beyond the cache raise on the CPU; a GPU does
            not wait for them: such a sequence writes nothing and gets NaN.
    """
    _check(query, k_cache, v_cache, cache_seqlens, key, value, block_table)
    _check_rope(query, cos, sin)
    _check_scales(k_cache, k_scale, v_scale)
    left = _check_window(window)
    batch, heads, _, dim = query.shape
    f = opmath(query.dtype)
    if alibi_slopes is not None:
        _require(
            tuple(alibi_slopes.shape) in ((heads,), (batch, heads)), "alibi_slopes", alibi_slopes,
            f"({heads},) or ({batch}, {heads})",
        )  # fmt: skip
        alibi_slopes = alibi_slopes.to(f).expand(batch, heads)
    if sinks is not None:
        _require(tuple(sinks.shape) == (heads,), "sinks", sinks, f"({heads},), one a head")
        sinks = sinks.to(f)
    if softcap < 0:
        raise ValueError(f"decode_attention: softcap is {softcap}, expected a positive number, or 0 for none")
    out, lse = DECODE_ATTENTION.apply(
        _rows(query), k_cache, v_cache, cache_seqlens.contiguous(), _rows(key), _rows(value),
        _rows(block_table), _rows(cos), _rows(sin), interleaved, k_scale, v_scale,
        1 / math.sqrt(dim) if scale is None else float(scale), left, float(softcap), alibi_slopes, sinks,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _rows(x: Tensor | None) -> Tensor | None:
    """Kernels take any strides but the last, which must be 1."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _require(ok: bool, name: str, x: Tensor, expected: str) -> None:
    if not ok:
        raise ValueError(f"decode_attention: {name} has shape {tuple(x.shape)}, expected {expected}")


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, key: Tensor | None, value: Tensor | None,
    table: Tensor | None,
) -> None:  # fmt: skip
    _require(q.dim() == 4, "query", q, "(batch, heads, length, head dim)")
    if not q.is_floating_point():
        raise ValueError(f"decode_attention: query is {q.dtype}, expected a floating-point tensor")
    batch, heads, s_q, dim = q.shape
    _require(dim > 0, "query", q, "a head dim of at least 1")
    layout = "(batch, heads, length, head dim)" if table is None else "(blocks, heads, block size, head dim)"
    _require(k_cache.dim() == 4, "k_cache", k_cache, layout)
    pages, kv_heads, length, _ = k_cache.shape
    _require(k_cache.shape[3] == dim, "k_cache", k_cache, f"head dim {dim} as query")
    divides = kv_heads > 0 and heads % kv_heads == 0
    _require(divides, "k_cache", k_cache, f"a number of heads that divides the query's {heads}")
    _require(v_cache.shape == k_cache.shape, "v_cache", v_cache, f"{tuple(k_cache.shape)} as k_cache")
    if table is None:
        _require(pages == batch, "k_cache", k_cache, f"batch {batch} as query")
    else:
        _require(table.dim() == 2 and table.shape[0] == batch, "block_table", table, f"({batch}, blocks)")
        _require(length > 0, "k_cache", k_cache, "pages of at least 1 position")
    _require(tuple(seqlens.shape) == (batch,), "cache_seqlens", seqlens, f"({batch},), one a sequence")
    if (key is None) != (value is None):
        raise ValueError("decode_attention: key and value, expected both or neither")
    for name, t in (("key", key), ("value", value)):
        if t is not None:
            _require(tuple(t.shape) == (batch, kv_heads, s_q, dim), name, t,
                     f"{(batch, kv_heads, s_q, dim)}")  # fmt: skip
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)) if key is not None else ():
        if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape)):
            raise ValueError(
                f"decode_attention: {name} is expanded and written to, expected elements that share no memory"
            )
    capacity = length if table is None else length * table.shape[1]
    _require(key is None or s_q <= capacity, "key", q if key is None else key,
             f"at most {capacity} new tokens, the size of the cache")  # fmt: skip
    dtypes = (torch.int32, torch.int64)
    expected = {
        "k_cache": (k_cache, (q.dtype, torch.int8)), "v_cache": (v_cache, (k_cache.dtype,)),
        "cache_seqlens": (seqlens, dtypes), "key": (key, (q.dtype,)), "value": (value, (q.dtype,)),
        "block_table": (table, (torch.int32,)),
    }  # fmt: skip
    for name, (t, allowed) in expected.items():
        if t is not None and t.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise ValueError(f"decode_attention: {name} is {t.dtype}, expected {names}")
        if t is not None and t.device != q.device:
            raise ValueError(f"decode_attention: {name} is on {t.device}, expected {q.device} as query")


def _check_rope(q: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("decode_attention: cos and sin, expected both or neither")
    fits = cos.dim() == 2 and 2 * cos.shape[1] <= q.shape[3]
    _require(fits, "cos", cos, f"(positions, at most {q.shape[3] // 2})")
    _require(sin.shape == cos.shape, "sin", sin, f"{tuple(cos.shape)} as cos")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in (torch.float32, opmath(q.dtype)) or t.device != q.device:
            raise ValueError(
                f"decode_attention: {name} is {t.dtype} on {t.device}, expected torch.float32 on {q.device}"
            )


def _check_scales(k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (t is None) == (k_cache.dtype == torch.int8):
            raise ValueError(
                f"decode_attention: {name} is {'missing' if t is None else 'given'} and k_cache is "
                f"{k_cache.dtype}, expected scales for torch.int8 and only for it"
            )
        if t is not None:
            _require(t.shape == k_cache.shape[:3], name, t, f"{tuple(k_cache.shape[:3])} as k_cache")
            if t.dtype not in (torch.float32, torch.float64) or t.device != k_cache.device:
                raise ValueError(
                    f"decode_attention: {name} is {t.dtype} on {t.device}, expected torch.float32 on "
                    f"{k_cache.device}"
                )


def _check_window(window: tuple[int, int] | None) -> int | None:
    """How far a query sees to the left."""
    if window is None:
        return None
    if len(window) != 2 or any(side < -1 for side in window):
        raise ValueError(
            f"decode_attention: window is {window}, expected (left, right), each -1 for no limit, or more"
        )
    return None if window[0] == -1 else int(window[0])


@register
class DECODE_ATTENTION(Op):
    """out = softmax(scale · q kᵀ) v over the cache, after the new keys and values have joined it

    The cache is read once, in the order of memory, by all query heads that share a key head.  It is cut
    into parts, each of which gives its softmax's numerator, sum and maximum; these are merged in the
    order of the parts, so that the result does not depend on who computed them.
    """

    name = "decode_attention"
    family = "decode"
    batched = ("query", "k_cache", "v_cache", "cache_seqlens", "key", "value")
    source = (
        "Dao et al. 2023, Flash-Decoding for long-context inference; "
        "Kwon et al. 2023, PagedAttention, arXiv:2309.06180, sec. 4.1; "
        "Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 34"
    )
    results = 2  # out and lse
    mutates = ("k_cache", "v_cache", "k_scale", "v_scale")
    public = staticmethod(decode_attention)

    @staticmethod
    def reference(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, key: Tensor | None,
        value: Tensor | None, block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        interleaved: bool, k_scale: Tensor | None, v_scale: Tensor | None, scale: float, left: int | None,
        softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        f = opmath(q.dtype)
        positions, total = cache.positions(q, k_cache, cache_seqlens, key, block_table, cos)
        queries = cache.rotate(q.to(f), cos, sin, positions, interleaved)
        if key is not None:
            place = cache.place(positions, k_cache, block_table)
            cache.write(k_cache, k_scale, place, cache.rotate(key.to(f), cos, sin, positions, interleaved))
            cache.write(v_cache, v_scale, place, value.to(f))
        k = cache.read(k_cache, k_scale, block_table, f)  # (B, H_kv, S, D)
        v = cache.read(v_cache, v_scale, block_table, f)
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        s = scale * (queries.unflatten(1, groups) @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
        if softcap > 0:
            s = softcap * (s / softcap).tanh()  # (B, H, S_q, S)
        j = torch.arange(k.shape[2], device=q.device)
        distance = j - positions[:, None, :, None]  # (B, 1, S_q, S)
        if alibi_slopes is not None:
            s = s + alibi_slopes[:, :, None, None] * distance
        hidden = distance > 0 if left is None else (distance > 0) | (distance < -left)
        s = s.masked_fill(hidden, -math.inf)
        lse = s.logsumexp(-1)  # (B, H, S_q)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None])
        p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        v = v.masked_fill((j >= total[:, None])[:, None, :, None], 0.0)  # 0 · NaN would be NaN
        out = (p.unflatten(1, groups) @ v[:, :, None]).flatten(1, 2)
        result, lse_result = DECODE_ATTENTION.outputs(q, *(None,) * 16)
        return result.copy_(out), lse_result.copy_(lse)

    @staticmethod
    def outputs(
        q, k_cache, v_cache, cache_seqlens, key, value, block_table, cos, sin, interleaved, k_scale, v_scale,
        scale, left, softcap, alibi_slopes, sinks,
    ):  # fmt: skip
        batch, heads, s_q, dim = q.shape
        out = q.new_empty(batch, s_q, heads, dim).transpose(1, 2)
        return out, q.new_empty(batch, heads, s_q, dtype=opmath(q.dtype))

    @staticmethod
    def refuse(backend, q, k_cache, v_cache, *others):
        if backend == "triton" and q.shape[3] > MAX_HEAD_DIM:
            return f"the head dim is {q.shape[3]}, the Triton kernel takes 1 to {MAX_HEAD_DIM}"
        if any(t.stride(3) != 1 and t.shape[3] != 1 for t in (k_cache, v_cache)):
            return "the cache's last stride is not 1"
        return None

    @staticmethod
    def splits(half, args):
        """By heads, or without pages by sequences."""
        caches = ("k_cache", "v_cache", "k_scale", "v_scale")
        rows = ("q", "key", "value", "alibi_slopes")
        heads, mesh = args["k_cache"].shape[1], args["k_cache"].device_mesh
        if all(heads % mesh.size(i) == 0 for i in range(mesh.ndim)):
            yield Split({**dict.fromkeys(caches + rows, 1), "sinks": 0}, (1, 1))
        if args["block_table"] is None:
            yield Split(dict.fromkeys((*caches, *rows, "cache_seqlens"), 0), (0, 0))

    @staticmethod
    def flops(q, k_cache, v_cache, cache_seqlens, key, value, block_table, *others):
        """4 FLOPs for each of the D elements of each query and position, as if the cache were full."""
        length = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
        return 4 * q.numel() * length

    @staticmethod
    def eager(
        query, k_cache, v_cache, cache_seqlens, key=None, value=None, *, block_table=None, cos=None,
        sin=None, interleaved=False, k_scale=None, v_scale=None, scale=None, window=None, softcap=0.0,
        alibi_slopes=None, sinks=None, return_lse=False,
    ):  # fmt: skip
        first = cache_seqlens.long() - (query.shape[2] if key is None else 0)
        positions = first[:, None] + torch.arange(query.shape[2], device=query.device)
        query = cache.rotate(query, cos, sin, positions, interleaved).to(query.dtype)
        if key is not None:
            place = cache.place(positions, k_cache, block_table)
            cache.write(k_cache, k_scale, place, cache.rotate(key, cos, sin, positions, interleaved))
            cache.write(v_cache, v_scale, place, value)
        k, v = (
            cache.read(part, part_scale, block_table, query.dtype)
            for part, part_scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        group = query.shape[1] // k.shape[1]
        distance = torch.arange(k.shape[2], device=query.device) - positions[:, None, :, None]
        seen = distance <= 0
        if window is not None and window[0] >= 0:
            seen = seen & (distance >= -window[0])
        f = opmath(query.dtype)
        bias = torch.zeros_like(distance, dtype=f).masked_fill(~seen, -math.inf)
        if alibi_slopes is not None:
            bias = bias + alibi_slopes.expand(query.shape[:2])[:, :, None, None] * distance
        if not (softcap or sinks is not None or return_lse):
            bias = bias.to(query.dtype)
            return F.scaled_dot_product_attention(query, k, v, bias, scale=scale, enable_gqa=group > 1)
        s = scale * (query @ k.repeat_interleave(group, 1).mT).to(f)
        s = (softcap * torch.tanh(s / softcap) if softcap else s) + bias
        if sinks is not None:
            s = torch.cat((s, sinks.to(f)[:, None, None].expand(*s.shape[:3], 1)), dim=-1)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]
        out = p.to(query.dtype) @ v.repeat_interleave(group, 1)
        return (out, s.logsumexp(-1)) if return_lse else out

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        yield from decode_samples.samples(make)

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        yield from decode_samples.benchmarks(make)

    @staticmethod
    def draw(make: Make) -> Sample:
        return decode_samples.draw(make)

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        yield from decode_samples.variants(make)

    @staticmethod
    def condition(query, k_cache, v_cache, seqlens, key=None, *args, scale=None, k_scale=None, **kwargs):
        """The largest |q||k| scale: how far one rounding of the scores can move an exponential."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale)
        keys = cache.read(k_cache, k_scale, None, torch.float64)
        norms = [t.double().norm(dim=-1) for t in (query, keys, keys if key is None else key)]
        query_norm, *key_norms = (n.max().item() if n.numel() else 0.0 for n in norms)
        return query_norm * max(key_norms) * scale
