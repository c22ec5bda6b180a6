"""DTensor: how the halves of an op may be split over the devices of a mesh dimension.

An op tells it by names, `Op.splits`; here it becomes the rules of `torch.distributed.tensor`, when the
first DTensor comes: to import that takes seconds.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .op import Op

SUM = "sum"  # every device holds a term


class Split(NamedTuple):
    """One way to split a half of an op; absent arguments may be named, too."""

    inputs: dict[str, int | str | None]  # argument -> the dimension in which it is split, or `SUM`
    outputs: tuple[int | str | None, ...]  # the same for each output; None, or not named, is whole


def wanted(need: bool, where: int | str) -> int | str | None:
    """Where an output is split: an unwanted one, without elements, is not."""
    return where if need else None


def look_at(args: tuple, table: dict[str, "Op"]) -> None:
    """Register the rules if there is a DTensor among the arguments of an op."""
    if any(type(a).__name__ == "DTensor" for a in args):
        _register(tuple(table.values()))


@cache
def _register(table: tuple) -> None:
    """Make every op of the table known to DTensor."""
    from torch.distributed.tensor.experimental import register_sharding

    for op in table:
        for half in (op.fwd, op.bwd):
            if half is not None:
                register_sharding(half)(_rule(op, half))


def _rule(op: "Op", half: Any) -> Any:
    names = [a.name for a in half._schema.arguments]
    count = len(half._schema.returns)

    def rule(*args: Any) -> list[tuple[list, list]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        given = dict(zip(names, args))
        is_tensor = [hasattr(a, "placements") for a in args]
        splits = [Split({}, (None,) * count), *op.splits("fwd" if half is op.fwd else "bwd", given)]

        def placement(where: int | str | None) -> Any:
            return Replicate() if where is None else Partial() if where == SUM else Shard(where)

        return [
            (
                [placement(where) for where in split.outputs],
                [placement(split.inputs.get(n)) if t else None for n, t in zip(names, is_tensor)],
            )
            for split in splits
        ]

    return rule
