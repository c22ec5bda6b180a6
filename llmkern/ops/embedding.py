"""Embedding: rows of a token table, plus rows of a position table, in one pass."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, empty, opmath, register
from .sharding import SUM, Split, like, wanted


def embedding(
    idx: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """The row of `weight` for each index, as `torch.nn.functional.embedding`, plus that of its position.

    Args:
        idx: (*, length) int64 or int32, in [0, rows).
        weight: (rows, dim); float32, bfloat16, float16 or float64.
        position_weight: (positions, dim) in the dtype of `weight`, or None.
        position_ids: int64 or int32, of a shape that expands to that of `idx`; None is 0, 1, 2, ... along
            the last dimension.
        padding_idx: this row of `weight` gets no gradient; negative counts from the end.

    Returns:
        (*, length, dim); the sum is computed in float32 and rounded once.  The gradient of each row is
        summed in token order in float32, so it has the same bits on every run.

    Raises:
        ValueError: a wrong shape or dtype.
        IndexError: an index or position outside its table, on the CPU; on a GPU its row is NaN.
    """
    idx, position_ids = _check(idx, weight, position_weight, position_ids)
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx is {padding_idx}, expected one of {rows} rows")
    padding_idx = None if padding_idx is None else padding_idx % rows
    position_weight = None if position_weight is None else position_weight.contiguous()
    y = EMBEDDING.apply(_flat(idx), weight.contiguous(), position_weight, _flat(position_ids), padding_idx)
    return y.view(*idx.shape, weight.shape[1])


def _check(
    idx: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Refuse what does not fit, in one sentence; return idx and position_ids of one shape."""
    for name, t in (("weight", weight), ("position_weight", position_weight)):
        if t is None:
            continue
        if t.dim() != 2 or t.shape[1] != weight.shape[1]:
            raise ValueError(
                f"embedding: {name} has shape {tuple(t.shape)}, expected (rows, dim), one dim for all"
            )
        if not t.shape[0] and idx.numel():
            raise ValueError(f"embedding: {name} has no rows, and idx asks for {idx.numel()}")
        if not t.is_floating_point() or t.dtype != weight.dtype:
            raise ValueError(f"embedding: {name} is {t.dtype}, expected tables of one floating-point dtype")
    for name, t in (("idx", idx), ("position_ids", position_ids)):
        if t is not None and t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"embedding: {name} is {t.dtype}, expected torch.int64 or torch.int32")
    for name, t in (("idx", idx), ("position_weight", position_weight), ("position_ids", position_ids)):
        if t is not None and t.device != weight.device:
            raise ValueError(f"embedding: {name} is on {t.device}, expected {weight.device} as weight")
    if position_weight is None:
        if position_ids is not None:
            raise ValueError("embedding: position_ids is given without position_weight")
        return idx, None
    if position_ids is None:
        position_ids = like(torch.arange(idx.shape[-1] if idx.dim() else 1, device=idx.device), idx)
        position_ids = position_ids if idx.dim() else position_ids[0]
    sizes = zip(reversed(position_ids.shape), reversed(idx.shape))
    if position_ids.dim() > idx.dim() or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"embedding: position_ids has shape {tuple(position_ids.shape)}, expected one that expands to "
            f"{tuple(idx.shape)} as idx"
        )
    return idx, position_ids.expand(idx.shape)


def _flat(idx: Tensor | None) -> Tensor | None:
    """(N,) int64, contiguous: a flattened expanded tensor can be a view whose elements share one address."""
    return None if idx is None else idx.reshape(-1).to(torch.int64).contiguous()


def _in_range(idx: Tensor, rows: int, what: str) -> None:
    bad = (idx < 0) | (idx >= rows)
    if idx.device.type == "cpu" and bad.any():
        raise IndexError(f"embedding: {what} {int(idx[bad][0])} is out of range, expected 0 to {rows - 1}")


@register
class EMBEDDING(Op):
    """y[n] = weight[idx[n]] + position_weight[position_ids[n]]

    Backward sorts the tokens by row and sums the gradients of each row in one place, so it needs no
    atomic additions, whose order changes from run to run.
    """

    name = "embedding"
    family = "embedding"
    batched = ("idx",)
    source = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, sec. 3.4 and 3.5"
    gradients = {"weight": 0, "position_weight": 1}
    public = staticmethod(embedding)

    @staticmethod
    def reference(
        idx: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None,
        padding_idx: int | None,
    ) -> Tensor:  # fmt: skip
        _in_range(idx, weight.shape[0], "index")
        if position_weight is None:
            return weight[idx]
        _in_range(position_ids, position_weight.shape[0], "position")
        f = opmath(weight.dtype)
        return (weight[idx].to(f) + position_weight[position_ids].to(f)).to(weight.dtype)

    @staticmethod
    def unread(idx, weight, position_weight, position_ids, padding_idx):
        """The rows that no token asks for, at least."""
        tables = [t for t in (weight, position_weight) if t is not None]
        return sum(max(0, t.shape[0] - idx.shape[0]) * t.shape[1] * t.element_size() for t in tables)

    @staticmethod
    def outputs(idx, weight, position_weight, position_ids, padding_idx):
        return weight.new_empty(idx.shape[0], weight.shape[1])

    @staticmethod
    def save(args, outs):
        idx, weight, position_weight, position_ids, padding_idx = args
        positions = 0 if position_weight is None else position_weight.shape[0]
        return idx, position_ids, weight.shape[0], positions, padding_idx

    @staticmethod
    def reference_bwd(
        dy: Tensor, idx: Tensor, position_ids: Tensor | None, rows: int, positions: int,
        padding_idx: int | None, needs: list[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        g = dy.to(opmath(dy.dtype))  # (N, D)
        dweight = dposition = empty(dy)
        if needs[0]:
            kept = g if padding_idx is None else g * (idx != padding_idx)[:, None]
            dweight = g.new_zeros(rows, g.shape[1]).index_add(0, idx, kept).to(dy.dtype)
        if needs[1]:
            dposition = g.new_zeros(positions, g.shape[1]).index_add(0, position_ids, g).to(dy.dtype)
        return dweight, dposition

    @staticmethod
    def outputs_bwd(dy, idx, position_ids, rows, positions, padding_idx, needs):
        sizes = zip((rows, positions), needs)
        dweight, dposition = (dy.new_empty(n, dy.shape[1]) if need else empty(dy) for n, need in sizes)
        return dweight, dposition

    @staticmethod
    def splits(half, args):
        """By tokens, or by columns of the tables."""
        if half == "fwd":
            yield Split({"idx": 0, "position_ids": 0}, (0,))
            yield Split({"weight": 1, "position_weight": 1}, (1,))
        else:
            for split, where in (({"dy": 0, "idx": 0, "position_ids": 0}, SUM), ({"dy": 1}, 1)):
                yield Split(split, tuple(wanted(need, where) for need in args["needs"]))

    @staticmethod
    def flops(idx, weight, position_weight, position_ids, padding_idx):
        return 0 if position_weight is None else idx.shape[0] * weight.shape[1]

    @staticmethod
    def flops_bwd(dy, idx, position_ids, rows, positions, padding_idx, needs):
        return dy.numel() * sum(needs)

    @staticmethod
    def eager(idx, weight, position_weight=None, position_ids=None, padding_idx=None):
        y = F.embedding(idx, weight, padding_idx)
        if position_weight is None:
            return y
        if position_ids is None:
            position_ids = torch.arange(idx.shape[-1] if idx.dim() else 1, device=idx.device)
            position_ids = position_ids.expand(idx.shape) if idx.dim() else position_ids[0]
        return y + F.embedding(position_ids, position_weight)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for rows, dim, shape in (
            (11, 7, (2, 5)),
            (5, 40, (17,)),
            (33, 3, (2, 2, 2)),
            (1, 1, (1,)),
            (3, 300, (9,)),
        ):
            label = f"{rows}x{dim}, {'x'.join(map(str, shape))}"
            yield Sample(label, (make.integers(rows, *shape), make(rows, dim)), {})
            positions = make(shape[-1] + 1, dim)
            yield Sample(label + ", positions", (make.integers(rows, *shape), make(rows, dim), positions), {})
        ids = make.integers(6, 5)
        yield Sample("position ids", (make.integers(9, 2, 5), make(9, 8), make(6, 8), ids), {})
        # too large for gradcheck: finite differences do not know of a row without gradient
        yield Sample("padding", (make.integers(2, 2, 6), make(51, 8)), {"padding_idx": -50})
        yield Sample("one index", (make.integers(4), make(4, 8), make(2, 8)), {})
        yield Sample("one row", (make.integers(1, 40), make(2, 8)), {})
        yield Sample("int32", (make.integers(9, 2, 5).int(), make(9, 8)), {})
        yield Sample("empty", (make.integers(9, 0), make(9, 8), make(2, 8)), {})
        yield Sample("strided", (make.integers(9, 5, 4).t(), make(8, 9).t()), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        rows, dim, shape = make.size(40), make.size(70), (make.size(4), make.size(20))
        kwargs = {"padding_idx": make.choices.randrange(rows)} if make.pick(0, 0, 1) else {}
        positions = make.pick(None, make.laid_out(shape[1] + make.pick(0, 3), dim))
        return Sample("random", (make.integers(rows, *shape), make.laid_out(rows, dim), positions), kwargs)

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        idx = make.integers(50257, 8, 1024)
        yield Sample("8x1024 of 50257x768 + positions", (idx, make(50257, 768), make(1024, 768)), {})
        yield Sample("4x2048 of 32000x4096", (make.integers(32000, 4, 2048), make(32000, 4096)), {})
