"""Inputs of decode attention: caches contiguous, paged and int8, short and uneven."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .op import Make, Sample, opmath

Arguments = tuple[tuple, dict]


def inputs(
    make: Make, b: int, h: int, h_kv: int, s_max: int, d: int, seqlens: Sequence[int], s_q: int = 1,
    new: bool = True, **kwargs: object,
) -> Arguments:  # fmt: skip
    """Query, caches (b, h_kv, s_max, d), their lengths and, with `new`, s_q new tokens."""
    caches = make(b, h_kv, s_max, d), make(b, h_kv, s_max, d)
    tokens = (make(b, h_kv, s_q, d), make(b, h_kv, s_q, d)) if new else ()
    lengths = torch.tensor(seqlens, dtype=torch.int32).to(make.device)
    return (make(b, h, s_q, d), *caches, lengths, *tokens), kwargs


def paged(
    make: Make, b: int, h: int, h_kv: int, blocks: int, size: int, d: int, seqlens: Sequence[int],
    s_q: int = 1, **kwargs: object,
) -> Arguments:  # fmt: skip
    """The same in pages of odd order; what the table has behind the length is nonsense."""
    pages = b * blocks
    (q, _, _, *rest), _ = inputs(make, b, h, h_kv, 0, d, seqlens, s_q)
    order = torch.arange(pages) * 7 % pages if pages % 7 else torch.arange(pages).flip(0)
    unused = torch.arange(blocks) * size >= torch.tensor(seqlens)[:, None] + s_q
    table = order.view(b, blocks).masked_fill(unused, -5).to(make.device, torch.int32)
    caches = make(pages, h_kv, size, d), make(pages, h_kv, size, d)
    return (q, *caches, *rest), {"block_table": table, **kwargs}


def quantised(make: Make, arguments: Arguments) -> Arguments:
    """The same with int8 caches."""
    (q, k, v, *rest), kwargs = arguments
    caches, scales = [], []
    for cache in (k.float(), v.float()):
        scale = cache.abs().amax(-1) / 127
        caches.append((cache / scale[..., None]).round().to(torch.int8))
        scales.append(scale.to(opmath(make.dtype)))
    return (q, *caches, *rest), {"k_scale": scales[0], "v_scale": scales[1], **kwargs}


def rope(make: Make, positions: int, half: int) -> dict[str, Tensor]:
    """Tables of the angles, (positions, half)."""
    angles = torch.outer(torch.arange(positions), 10000.0 ** (-torch.arange(half) / half))
    return {"cos": angles.cos().to(make.device), "sin": angles.sin().to(make.device)}


def samples(make: Make) -> Iterator[Sample]:
    """Small ones for the tests; the error rule sees what is written to the caches, too."""
    lse = {"return_lse": True}

    def plain(label: str, *args: object, **kwargs: object) -> Sample:
        return Sample(label, *inputs(make, *args, **kwargs))

    yield plain("one token", 2, 4, 2, 70, 16, (33, 69), **lse)
    yield Sample("paged", *paged(make, 3, 2, 1, 5, 16, 16, (7, 79, 40), **lse))
    yield plain("rope", 2, 4, 2, 40, 16, (17, 39), **rope(make, 40, 8))
    yield Sample("int8", *quantised(make, inputs(make, 2, 4, 2, 40, 16, (17, 39), **lse)))
    yield plain("interleaved, partial rope", 1, 2, 1, 20, 24, (9,), 3, **rope(make, 20, 4), interleaved=True)
    both = paged(make, 2, 2, 1, 3, 8, 32, (11, 20), 2, **rope(make, 24, 16))
    yield Sample("int8, rope, paged", *quantised(make, both))
    yield plain("no new token", 2, 2, 2, 30, 16, (30, 5), new=False, **lse)
    yield plain("no new token, several queries", 2, 2, 1, 30, 16, (20, 2), 4, new=False, **lse)
    yield plain("empty cache", 2, 3, 3, 16, 16, (0, 0), new=False, **lse)
    yield plain("first token", 1, 2, 2, 16, 16, (0,))
    yield plain("several tokens", 1, 6, 2, 64, 16, (59,), 3, **lse)
    yield plain("several parts", 1, 2, 1, 270, 16, (269,), **lse)
    yield plain("prime sizes", 2, 3, 3, 67, 37, (66, 1), **lse)
    yield plain("one key head for 12", 1, 12, 1, 48, 8, (41,))
    yield plain("head dim 1", 1, 1, 1, 9, 1, (7,))
    yield plain("window", 2, 2, 1, 270, 16, (263, 3), 2, window=(8, 0), **lse)
    yield plain("softcap", 1, 2, 2, 40, 16, (30,), softcap=5.0, **lse)
    slopes = torch.tensor((0.5, 0.25)).to(make.device)
    yield plain("alibi", 2, 2, 1, 40, 16, (30, 8), 2, alibi_slopes=slopes, **lse)
    yield plain("sinks", 2, 2, 1, 40, 16, (0, 20), new=False, sinks=make(2), **lse)
    yield plain("negative scale", 1, 2, 2, 20, 16, (12,), scale=-0.7)
    yield plain("empty batch", 0, 2, 2, 20, 16, ())
    (q, _, _, lengths, *tokens), _ = inputs(make, 2, 4, 2, 1, 16, (20, 39))
    caches = (make(2, 40, 2, 16).transpose(1, 2) for _ in range(2))
    yield Sample("token-major cache", (q, *caches, lengths.long(), *tokens), {})


def benchmarks(make: Make) -> Iterator[Sample]:
    """GPT-2's heads, and Llama 3's 8B."""
    for b, h, h_kv, s, d in ((4, 12, 12, 4096, 64), (4, 32, 8, 4096, 128)):
        yield Sample(f"{b}x{h}/{h_kv}x{s}x{d}", *inputs(make, b, h, h_kv, s, d, (s - 1,) * b))


def variants(make: Make) -> Iterator[Sample]:
    """Head dims, and what changes the code: pages, int8, rope, what hides or moves scores."""
    for d in (16, 32):
        yield Sample(f"head dim {d}", *inputs(make, 2, 8, 2, 1024, d, (1000, 1000)))
    for d in (64, 128, 256):
        yield Sample(f"head dim {d}, 5 tokens", *inputs(make, 2, 32, 2, 1024, d, (9, 9), 5))
        whole = paged(make, 2, 32, 4, 64, 16, d, (99, 99), **rope(make, 1024, d // 2), sinks=make(32))
        yield Sample(f"head dim {d}, int8, rope, paged", *quantised(make, whole))
    slopes = torch.ones(32).to(make.device)
    moved = inputs(make, 2, 32, 4, 1024, 128, (9, 9), window=(64, 0), softcap=30.0, alibi_slopes=slopes)
    yield Sample("window, softcap, alibi", *moved)


def draw(make: Make) -> Sample:
    b, h_kv, d, s_q = make.size(3), make.size(3), 2 * make.size(40), make.pick(1, 1, 2, 5)
    h, room = h_kv * make.pick(1, 2, 3), make.pick(40, 150, 300)
    kwargs = {"return_lse": True, "scale": make.pick(None, 0.2)}
    some = {
        "window": (make.size(30), 0),
        "softcap": make.pick(2.0, 20.0),
        "alibi_slopes": make(h).abs() / 4,
        "sinks": make(h),
        **({"rope": True} if make.pick(0, 1) else {}),
    }
    kwargs |= {name: some[name] for name in make.choices.sample(list(some), make.pick(0, 1, 2))}
    if kwargs.pop("rope", False):
        kwargs |= rope(make, room, make.size(d // 2)) | {"interleaved": make.pick(True, False)}
    lengths = [make.choices.randrange(room - s_q + 1) for _ in range(b)]
    if make.pick(0, 1):
        size = make.pick(8, 16)
        arguments = paged(make, b, h, h_kv, -(-room // size), size, d, lengths, s_q, **kwargs)
    else:
        arguments = inputs(make, b, h, h_kv, room, d, lengths, s_q, **kwargs)
    return Sample("random", *(quantised(make, arguments) if make.pick(0, 0, 1) else arguments))
