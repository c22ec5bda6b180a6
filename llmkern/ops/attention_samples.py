"""Inputs of attention: ordinary, nasty, and those that reach every variant of the kernels."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .op import Make, Sample


def qkv(
    make: Make, b: int, h: int, s_q: int, d: int, h_kv: int | None = None, s_k: int | None = None,
    d_v: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value; as many heads, keys and dimensions of a value as queries have, unless told."""
    h_kv, s_k = h_kv or h, s_q if s_k is None else s_k
    return make(b, h, s_q, d), make(b, h_kv, s_k, d), make(b, h_kv, s_k, d_v or d)


def samples(make: Make) -> Iterator[Sample]:
    yield from _shapes(make)
    yield from _masks(make)
    yield from _layouts(make)
    yield from _windows_and_documents(make)
    yield from _biases(make)
    yield from _dropped(make)


def _shapes(make: Make) -> Iterator[Sample]:
    causal = {"is_causal": True}
    right = {"is_causal": True, "causal_align": "bottom_right"}
    yield Sample("2x3x64x64", qkv(make, 2, 3, 64, 64), {})
    yield Sample("causal", qkv(make, 1, 2, 100, 64), causal)
    yield Sample("causal, prime sizes", qkv(make, 1, 3, 67, 37), causal)
    yield Sample("head dim 1", qkv(make, 1, 1, 5, 1), causal)
    yield Sample("head dim 128", qkv(make, 1, 2, 70, 128), causal)
    yield Sample("head dim 256", qkv(make, 1, 1, 33, 256), causal)
    yield Sample("length 1", qkv(make, 3, 2, 1, 16), {})
    yield Sample("GQA", qkv(make, 2, 6, 40, 32, h_kv=2), causal)
    yield Sample("MQA", qkv(make, 1, 4, 35, 16, h_kv=1), {})
    yield Sample("cross", qkv(make, 1, 2, 19, 32, s_k=83), {})
    yield Sample("more keys, top left", qkv(make, 1, 2, 19, 32, s_k=83), causal)
    yield Sample("more keys, bottom right", qkv(make, 1, 2, 19, 32, s_k=83), right)
    yield Sample("fewer keys, top left", qkv(make, 1, 2, 83, 32, s_k=19), causal)
    yield Sample("fewer keys, bottom right", qkv(make, 1, 2, 83, 32, s_k=19), right)
    yield Sample("one query", qkv(make, 2, 4, 1, 64, h_kv=2, s_k=130), right)
    yield Sample("no keys", qkv(make, 1, 2, 4, 16, s_k=0), {})
    yield Sample("no queries", qkv(make, 1, 2, 0, 16, s_k=7), {})
    yield Sample("empty batch", qkv(make, 0, 2, 5, 16), causal)
    yield Sample("scale", qkv(make, 1, 2, 20, 24), {"scale": 0.7})
    yield Sample("scale 0", qkv(make, 1, 1, 20, 24), {"scale": 0.0})


def _masks(make: Make) -> Iterator[Sample]:
    padding = make.integers(2, 3, 1, 1, 50) == 1
    yield Sample("padding mask", qkv(make, 3, 2, 50, 32), {"attn_mask": padding})
    full = make.integers(2, 2, 2, 33, 45) == 1
    yield Sample("bool mask", qkv(make, 2, 2, 33, 32, s_k=45), {"attn_mask": full})
    yield Sample("float mask", qkv(make, 1, 2, 33, 32), {"attn_mask": make(33, 33)})
    infinite = torch.zeros(33, 40).masked_fill(make.integers(2, 33, 40).cpu() == 1, -math.inf)
    infinite = infinite.to(make.device, make.dtype)
    yield Sample("-inf mask, GQA", qkv(make, 1, 4, 33, 16, h_kv=2, s_k=40), {"attn_mask": infinite})
    yield Sample("mask and causal", qkv(make, 3, 2, 50, 32), {"attn_mask": padding, "is_causal": True})
    nothing = torch.zeros(4, 9, dtype=torch.bool, device=make.device)
    yield Sample("all masked", qkv(make, 1, 2, 4, 16, s_k=9), {"attn_mask": nothing})


def _layouts(make: Make) -> Iterator[Sample]:
    causal = {"is_causal": True}
    packed = make(2, 21, 3, 4, 32)  # (B, S, 3, H, D), as a fused projection gives
    yield Sample("packed qkv", tuple(packed.permute(2, 0, 3, 1, 4)), causal)
    yield Sample("last stride 2", tuple(make(1, 2, 17, 48)[..., ::2] for _ in range(3)), causal)
    shared = make(1, 2, 9, 16)
    yield Sample(
        "shared heads", tuple(t.expand(1, 2, 9, 16) for t in (shared, shared[:, :1], shared[:, :1])), {}
    )
    yield Sample("large scores", tuple(10 * t for t in qkv(make, 1, 2, 40, 64)), causal)


def _windows_and_documents(make: Make) -> Iterator[Sample]:
    causal = {"is_causal": True}
    yield Sample("window", qkv(make, 1, 2, 300, 16), {"window": (40, 7)})
    yield Sample("window, causal", qkv(make, 1, 2, 290, 16), {"window": (33, -1), **causal})
    yield Sample("window to the right", qkv(make, 1, 1, 70, 16), {"window": (-1, 5)})
    yield Sample("window of one", qkv(make, 1, 1, 40, 16), {"window": (0, 0)})
    right = {"causal_align": "bottom_right"}
    yield Sample(
        "window, GQA, more keys", qkv(make, 1, 4, 60, 16, h_kv=2, s_k=200), {"window": (50, 0), **right}
    )
    yield Sample("window, fewer keys", qkv(make, 1, 1, 90, 16, s_k=30), {"window": (10, 10), **right})
    yield Sample("window past the keys", qkv(make, 1, 1, 90, 16, s_k=30), {"window": (10, 0)})
    padding = make.integers(2, 2, 1, 1, 150) == 1
    options = {"window": (30, 0), "attn_mask": padding}
    yield Sample("window and mask", qkv(make, 2, 2, 150, 16), options)
    ids = torch.tensor([0] * 30 + [1] * 100 + [7] + [3] * 69).to(make.device)
    documents = {"document_ids": torch.stack((ids, ids.flip(0), torch.zeros_like(ids)))}
    yield Sample("documents", qkv(make, 3, 2, 200, 16), documents)
    yield Sample("documents, causal", qkv(make, 3, 2, 200, 16), {**documents, **causal})
    yield Sample("documents, window", qkv(make, 3, 4, 200, 16, h_kv=2), {**documents, "window": (20, 3)})
    yield Sample("documents, none", qkv(make, 2, 1, 0, 16), {"document_ids": ids.new_zeros(2, 0)})


def _biases(make: Make) -> Iterator[Sample]:
    causal = {"is_causal": True}
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).to(make.device, make.dtype)
    yield Sample("ALiBi", qkv(make, 2, 4, 70, 16), {"alibi_slopes": slopes, **causal})
    each = torch.stack((slopes, -slopes / 8, slopes / 2))
    yield Sample("ALiBi for each", qkv(make, 3, 4, 40, 16, h_kv=2), {"alibi_slopes": each})
    right = {"is_causal": True, "causal_align": "bottom_right"}
    yield Sample("ALiBi, more keys", qkv(make, 1, 4, 9, 16, s_k=150), {"alibi_slopes": slopes, **right})
    yield Sample("softcap", tuple(3 * t for t in qkv(make, 2, 2, 70, 32)), {"softcap": 5.0, **causal})
    yield Sample("softcap, small", qkv(make, 1, 2, 20, 8), {"softcap": 0.7})
    masked = {"attn_mask": make(20, 20), "alibi_slopes": slopes, "softcap": 4.0, "window": (9, 3)}
    yield Sample("softcap, ALiBi, float mask, window", qkv(make, 2, 4, 20, 16, h_kv=1), masked)
    yield Sample("sinks", qkv(make, 2, 4, 70, 16, h_kv=2), {"sinks": make(4), **causal})
    yield Sample("sinks, small", qkv(make, 1, 2, 9, 8), {"sinks": 3 * make(2)})
    nothing = torch.zeros(4, 9, dtype=torch.bool, device=make.device)
    yield Sample("sinks, all masked", qkv(make, 1, 2, 4, 16, s_k=9), {"attn_mask": nothing, "sinks": make(2)})
    yield Sample("lse too", qkv(make, 2, 4, 70, 16, h_kv=2), {"return_lse": True, **causal})
    both = {"return_lse": True, "sinks": make(2), "softcap": 5.0}
    yield Sample("lse too, sinks", qkv(make, 1, 2, 40, 16), both)
    yield Sample("wide values", qkv(make, 1, 2, 50, 24, d_v=40), causal)
    yield Sample("narrow values, GQA", qkv(make, 2, 4, 50, 64, h_kv=2, d_v=16), {})
    yield Sample("values of one", qkv(make, 1, 1, 9, 8, d_v=1), {})


def _dropped(make: Make) -> Iterator[Sample]:
    seed = {"dropout_seed": torch.tensor(2**40 + 3, device=make.device)}
    yield Sample("dropout", qkv(make, 2, 2, 70, 16), {"dropout_p": 0.3, **seed})
    yield Sample("dropout, small", qkv(make, 1, 2, 9, 8), {"dropout_p": 0.5, **seed})
    options = {"is_causal": True, "window": (150, 0), "sinks": make(4), "softcap": 6.0, **seed}
    yield Sample("dropout and more", qkv(make, 1, 4, 300, 16, h_kv=2), {"dropout_p": 0.1, **options})
    yield Sample("all dropped", qkv(make, 1, 1, 20, 16), {"dropout_p": 1.0, **seed})


def benchmarks(make: Make) -> Iterator[Sample]:
    for b, h, s, d in ((8, 6, 256, 64), (4, 12, 1024, 64), (1, 12, 2048, 64), (1, 8, 2048, 128)):
        packed = make(b, s, 3, h, d).permute(2, 0, 3, 1, 4)
        yield Sample(f"{b}x{h}x{s}x{d} causal", tuple(packed), {"is_causal": True})
    packed = make(1, 4096, 3, 8, 64).permute(2, 0, 3, 1, 4)
    yield Sample("1x8x4096x64 causal, window 512", tuple(packed), {"is_causal": True, "window": (512, 0)})


def variants(make: Make) -> Iterator[Sample]:
    for dim in (16, 32, 256):
        few = tuple(make(2, heads, 1024, dim) for heads in (4, 2, 2))
        yield Sample(f"head dim {dim}, causal", few, {"is_causal": True})
    for dim in (64, 128, 256):
        mask = {"attn_mask": make(1024, 1024)}
        yield Sample(f"head dim {dim}, float mask", qkv(make, 2, 4, 1024, dim), mask)
    all_ = qkv(make, 2, 4, 1024, 64)
    yield Sample("not causal", all_, {})
    yield Sample("bool mask", all_, {"attn_mask": make.integers(2, 2, 1, 1, 1024) == 1})
    seed = torch.tensor(7, device=make.device)
    rules = {
        "window": {"window": (128, 0)},
        "documents": {"document_ids": make.integers(2, 2, 1024), "is_causal": True},
        "ALiBi": {"alibi_slopes": make(4), "is_causal": True},
        "softcap": {"softcap": 30.0, "is_causal": True},
        "sinks": {"sinks": make(4), "is_causal": True},
        "dropout": {"dropout_p": 0.1, "dropout_seed": seed, "is_causal": True},
    }
    for label, options in rules.items():
        yield Sample(label, all_, options)
    yield Sample("wide keys", qkv(make, 2, 4, 1024, 128, d_v=64), {"is_causal": True})
    both = {"softcap": 30.0, "sinks": make(4), "window": (128, 0)}
    for dim in (128, 256):
        yield Sample(f"head dim {dim}, softcap, sinks, window", qkv(make, 2, 4, 1024, dim), both)


def draw(make: Make) -> Sample:
    h_kv, d, s_q = make.size(3), make.size(80), make.size(90)
    h, b, s_k = h_kv * make.pick(1, 1, 2, 3), make.size(3), make.pick(s_q, s_q, make.size(150))
    d_v = make.pick(d, d, make.size(80))
    shapes = (b, h, s_q, d), (b, h_kv, s_k, d), (b, h_kv, s_k, d_v)
    scale = make.pick(0.3, 1, 1, 4)
    kwargs = {"is_causal": make.pick(True, False), "causal_align": make.pick("top_left", "bottom_right")}
    some = {
        "attn_mask": make.integers(3, make.pick(1, b), 1, make.pick(1, s_q), s_k) > 0,
        "window": make.pick((make.size(40), make.size(9)), (make.size(40), -1), (0, 0)),
        "softcap": make.pick(2.0, 20.0),
        "alibi_slopes": make(h).abs() / 4,
        "sinks": make(h),
        "scale": make.pick(0.1, 0.5),
        "return_lse": True,
        "dropout_p": make.pick(0.1, 0.5),
    }
    kwargs |= {name: some[name] for name in make.choices.sample(list(some), make.pick(0, 1, 1, 2))}
    if "dropout_p" in kwargs:
        kwargs["dropout_seed"] = make.integers(2**62)
    return Sample("random", tuple(make.laid_out(*shape, scale=scale) for shape in shapes), kwargs)
