"""Rotary position embeddings of queries and keys, in one pass over both, out of place and in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .op import Make, Op, Sample, empty, opmath, register
from .rope_table import rope_table
from .sharding import Split, wanted


def rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate pairs of elements of each head by an angle that grows with the token's position.

    Args:
        query: (batch, heads, length, head dim) with any strides; float32, bfloat16, float16 or float64.
        key: (batch, key heads, length, head dim) in the dtype of `query`, or None.
        cos, sin: (positions, pairs) float32, as `rope_table` makes them; the first 2 · pairs elements of
            a head are rotated, the rest is copied.
        interleaved: pairs are elements (2i, 2i + 1), as in RoFormer and GPT-J; else (i, i + pairs), as in
            Hugging Face's Llama.
        position_ids: (length,) or (batch, length) int64, the row of the tables for each token; None is
            0, 1, 2, ...

    Returns:
        The rotated query and key, or the query alone if `key` is None; in the dtype and memory layout of
        the inputs.  Computed in float32 and rounded once.

    Raises:
        ValueError: a wrong shape or dtype.
        IndexError: a position outside the tables, on the CPU; on a GPU its rows are NaN.
    """
    position_ids = _check("rope", query, key, cos, sin, position_ids)
    query_out, key_out = ROPE.apply(
        _rows(query), None if key is None else _rows(key), cos.contiguous(), sin.contiguous(),
        position_ids, interleaved,
    )  # fmt: skip
    return query_out if key is None else (query_out, key_out)


def rope_(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rope` in place, for inference: writes to `query` and `key`, and returns them.

    Arguments and errors are those of `rope`.

    Raises:
        ValueError: a `query` or `key` with elements that share memory, too.
        RuntimeError: an argument that requires a gradient.
    """
    position_ids = _check("rope_", query, key, cos, sin, position_ids)
    for name, t in (("query", query), ("key", key)):
        if t is not None and any(st == 0 and size > 1 for st, size in zip(t.stride(), t.shape)):
            raise ValueError(f"rope_: {name} is expanded, expected a tensor whose elements share no memory")
    ROPE_INPLACE.apply(query, key, cos.contiguous(), sin.contiguous(), position_ids, interleaved)
    return query if key is None else (query, key)


def _check(
    fn: str, query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> Tensor | None:
    """Refuse what does not fit, in one sentence; return position_ids as (batch or 1, length)."""
    for name, t in (("query", query), ("key", key)):
        if t is None:
            continue
        if t.dim() != 4:
            raise ValueError(
                f"{fn}: {name} has shape {tuple(t.shape)}, expected 4 dimensions "
                "(batch, heads, length, head dim)"
            )
        if not t.is_floating_point() or t.dtype != query.dtype:
            raise ValueError(f"{fn}: {name} is {t.dtype}, expected query and key of one floating-point dtype")
    batch, _, length, dim = query.shape
    if key is not None and (key.shape[0], *key.shape[2:]) != (batch, length, dim):
        raise ValueError(
            f"{fn}: key has shape {tuple(key.shape)}, expected ({batch}, key heads, {length}, {dim}) as query"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 2 or t.shape != cos.shape or 2 * t.shape[1] > dim:
            raise ValueError(
                f"{fn}: {name} has shape {tuple(t.shape)}, expected cos and sin of one shape "
                f"(positions, pairs) with at most {dim // 2} pairs for head dim {dim}"
            )
        if t.dtype not in (torch.float32, opmath(query.dtype)):
            raise ValueError(f"{fn}: {name} is {t.dtype}, expected torch.float32")
    for name, t in (("key", key), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if t is not None and t.device != query.device:
            raise ValueError(f"{fn}: {name} is on {t.device}, expected {query.device} as query")
    fewest = length if position_ids is None else min(length, 1)
    if cos.shape[0] < fewest:
        raise ValueError(f"{fn}: cos has {cos.shape[0]} positions, expected at least {fewest}")
    if position_ids is None:
        return None
    if position_ids.dtype != torch.int64:
        raise ValueError(f"{fn}: position_ids is {position_ids.dtype}, expected torch.int64")
    if tuple(position_ids.shape) not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"{fn}: position_ids has shape {tuple(position_ids.shape)}, expected ({length},) "
            f"or ({batch}, {length})"
        )
    return position_ids.reshape(-1, length)


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor with the shape of x and the order of its dimensions in memory."""
    return torch.empty_like(x)


class Rope(Op):
    """What both ops share: their arguments, samples and cost."""

    family = "rope"
    batched = ("query", "key")
    source = (
        "Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 34 (interleaved); "
        "Black et al. 2022, GPT-NeoX-20B, arXiv:2204.06745, sec. 2.1.1 (partial)"
    )
    constant = ("cos", "sin")

    @staticmethod
    def splits(half, args):
        """By sequences, heads, or tokens if each has a row of tables of its own, or a position."""
        ids, cos = args["position_ids"], args["cos"]
        of = ("query", "key") if half == "fwd" else ("dquery_out", "dkey_out")
        there = (True, args["key"] is not None) if half == "fwd" else args["needs"]
        batch, _, length, _ = args[of[0]].shape

        def split(dim: int, **tables: int) -> Split:
            heads = {name: dim for name in of if args[name] is not None and len(args[name].shape) == 4}
            return Split({**heads, **tables}, tuple(wanted(t, dim) for t in there))

        yield split(0, **({"position_ids": 0} if ids is not None and ids.shape[0] == batch > 1 else {}))
        yield split(1)
        if ids is not None:
            yield split(2, position_ids=1)
        elif cos.shape[0] == length:
            yield split(2, cos=0, sin=0)

    @staticmethod
    def flops(query, key, cos, sin, position_ids, interleaved):
        return sum(_flops(t, cos) for t in (query, key) if t is not None)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for batch, heads, key_heads, length, dim in ((2, 4, 2, 3, 32), (1, 1, 1, 17, 6), (1, 1, 1, 1, 2)):
            yield _sample(make, batch, heads, key_heads, length, dim)
            yield _sample(make, batch, heads, key_heads, length, dim, interleaved=True)
        yield _sample(make, 1, 2, 1, 3, 20, rotary=10)
        yield _sample(make, 1, 2, 1, 3, 80, rotary=66, interleaved=True)
        yield _sample(make, 2, 2, 2, 3, 256)
        yield _sample(make, 1, 19, 17, 2, 256, interleaved=True)
        yield _sample(make, 1, 2, 2, 0, 8)
        ids = {"position_ids": make.integers(9, 4)}
        yield _sample(make, 2, 2, 1, 4, 8, positions=9, **ids)
        yield _sample(make, 2, 2, 1, 4, 8, positions=9, position_ids=make.integers(9, 2, 4), interleaved=True)
        tables = rope_table(6, 8, device=make.device)
        yield Sample("query alone", (make(2, 3, 6, 8), None, *tables), {})
        qkv = make(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)  # of one matrix product, as in GPT-2
        yield Sample("views of qkv", (qkv[0], qkv[1], *tables), {})
        yield Sample("strided", (make(2, 3, 6, 16)[..., ::2], make(2, 2, 8, 6).mT, *tables), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        yield _sample(make, 1, 32, 8, 4096, 128)
        yield _sample(make, 4, 16, 16, 2048, 256, rotary=64, interleaved=True)

    @staticmethod
    def draw(make: Make) -> Sample:
        batch, length, dim = make.size(3), make.size(20), 2 * make.size(64)
        kwargs = {"interleaved": make.pick(False, True), "rotary": make.pick(None, 2 * make.size(dim // 2))}
        if make.pick(0, 1):
            shape = make.pick((length,), (batch, length))
            kwargs |= {"positions": length + 5, "position_ids": make.integers(length + 5, *shape)}
        return _sample(make, batch, make.size(5), make.size(5), length, dim, **kwargs)

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        yield _sample(make, 2, 8, 8, 64, 64, position_ids=make.integers(64, 2, 64), interleaved=True)
        yield _sample(make, 2, 8, 8, 64, 80, rotary=32)

    @staticmethod
    def eager(query, key, cos, sin, *, interleaved=False, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(query.shape[2], device=query.device)
        cos, sin = (t[position_ids].unsqueeze(-3).to(query.dtype) for t in (cos, sin))  # (.., 1, S, pairs)
        out = tuple(_rotate(t, cos, sin, interleaved) for t in (query, key) if t is not None)
        return out if len(out) > 1 else out[0]


def _sample(
    make: Make, batch: int, heads: int, key_heads: int, length: int, dim: int,
    rotary: int | None = None, positions: int | None = None, **kwargs,
) -> Sample:  # fmt: skip
    """Query and key as a matrix product leaves them, (batch, length, heads, head dim) in memory."""
    query, key = (make(batch, length, h, dim).transpose(1, 2) for h in (heads, key_heads))
    tables = rope_table(positions or length, rotary or dim, device=make.device)
    marks = [name for name, value in kwargs.items() if value is not False]
    label = f"{batch}x{heads}/{key_heads}x{length}x{dim}"
    label += f" of {rotary}" if rotary else ""
    return Sample(" ".join([label, *marks]), (query, key, *tables), kwargs)


def _flops(x: Tensor, cos: Tensor) -> int:
    """Four products and two sums for a pair."""
    return x.shape[0] * x.shape[1] * x.shape[2] * cos.shape[1] * 6


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) with its pairs rotated; cos, sin (B or 1, 1, S, pairs)."""
    pairs = cos.shape[-1]
    turned = x[..., : 2 * pairs]
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.tensor_split(2, -1)
    new = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(new, -1).flatten(-2) if interleaved else torch.cat(new, -1)
    return torch.cat((turned, x[..., 2 * pairs :]), -1)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool) -> Tensor:
    f = opmath(x.dtype)
    if position_ids is None:
        position_ids = torch.arange(x.shape[2], device=x.device)[None]
    elif x.device.type == "cpu":
        _positions_in_range(position_ids, cos.shape[0])
    cos, sin = (t.to(f)[position_ids][:, None] for t in (cos, sin))  # (B or 1, 1, S, pairs)
    return _like(x).copy_(_rotate(x.to(f), cos, sin, interleaved))


def _positions_in_range(position_ids: Tensor, positions: int) -> None:
    bad = (position_ids < 0) | (position_ids >= positions)
    if bad.any():
        raise IndexError(
            f"rope: position {int(position_ids[bad][0])} is out of range, expected 0 to {positions - 1}"
        )


@register
class ROPE(Rope):
    """(y[a], y[b]) = (x[a] cos - x[b] sin, x[b] cos + x[a] sin) for each pair (a, b) of a head

    The angle of pair i at position p is p · base^(-2i/dim).  Backward is the rotation by the negative
    angle, so it needs the tables alone.
    """

    name = "rope"
    results = 2  # the query and the key
    materialize = True
    gradients = {"query": 0, "key": 1}
    public = staticmethod(rope)

    @staticmethod
    def reference(
        query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor,
        position_ids: Tensor | None, interleaved: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        turned = _reference(query, cos, sin, position_ids, interleaved)
        if key is None:
            return turned, empty(query)
        return turned, _reference(key, cos, sin, position_ids, interleaved)

    @staticmethod
    def outputs(query, key, cos, sin, position_ids, interleaved):
        return _like(query), empty(query) if key is None else _like(key)

    @staticmethod
    def save(args, outs):
        return args[2:]

    @staticmethod
    def prepare_grad(grad):
        return _rows(grad)

    @staticmethod
    def reference_bwd(
        dquery_out: Tensor, dkey_out: Tensor, cos: Tensor, sin: Tensor,
        position_ids: Tensor | None, interleaved: bool, needs: list[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dquery, dkey = (
            _reference(d, cos, -sin, position_ids, interleaved) if need else empty(d)
            for d, need in zip((dquery_out, dkey_out), needs)
        )
        return dquery, dkey

    @staticmethod
    def outputs_bwd(dquery_out, dkey_out, cos, sin, position_ids, interleaved, needs):
        dquery, dkey = (_like(d) if need else empty(d) for d, need in zip((dquery_out, dkey_out), needs))
        return dquery, dkey

    @staticmethod
    def flops_bwd(dquery_out, dkey_out, cos, sin, position_ids, interleaved, needs):
        return sum(_flops(d, cos) for d, need in zip((dquery_out, dkey_out), needs) if need)


@register
class ROPE_INPLACE(Rope):
    """query, key <- rope(query, key), without other memory"""

    name = "rope_inplace"
    mutates = ("query", "key")
    public = staticmethod(rope_)

    @staticmethod
    def reference(
        query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor,
        position_ids: Tensor | None, interleaved: bool,
    ) -> None:  # fmt: skip
        for x in (query, key):
            if x is not None:
                x.copy_(_reference(x, cos, sin, position_ids, interleaved))

    @staticmethod
    def outputs(query, key, cos, sin, position_ids, interleaved):
        return None

    @staticmethod
    def refuse(backend, query, key, cos, sin, position_ids, interleaved):
        if any(t is not None and t.stride(-1) != 1 and t.shape[-1] > 1 for t in (query, key)):
            return "the elements of a head do not lie side by side (the last stride is not 1)"
        return None

    @staticmethod
    def samples(make):
        for sample in Rope.samples(make):
            if sample.label != "strided":
                yield sample

    @staticmethod
    def eager(query, key, cos, sin, **kwargs):
        out = Rope.eager(query, key, cos, sin, **kwargs)
        for x, y in zip((query, key), out if key is not None else (out,)):
            x.copy_(y)
        return out
