"""DTensor: how the halves of an op may be split over the devices of a mesh dimension.

An op tells it by names, `Op.splits`; here it becomes the rules of `torch.distributed.tensor`, when the
first DTensor comes: to import that takes seconds.
"""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

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


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor."""
    return type(x).__name__ == "DTensor"


def look_at(args: tuple, table: dict[str, "Op"]) -> tuple:
    """If there is a DTensor among the arguments of an op: register the rules, and make all tensors DTensors.

    A plain tensor among them is the same on every device: it counts as whole.
    """
    mesh = next((a.device_mesh for a in args if is_sharded(a)), None)
    if mesh is None:
        return args
    _register(tuple(table.values()))
    return tuple(whole(a, mesh) if isinstance(a, Tensor) else a for a in args)


def whole(x: Tensor, mesh: Any) -> Tensor:
    """x as a DTensor; a plain one is the same on every device."""
    from torch.distributed.tensor import DTensor, Replicate

    return x if is_sharded(x) else DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def like(x: Tensor, other: Tensor) -> Tensor:
    """x, whole on every device of `other`, if that is a DTensor."""
    return whole(x, other.device_mesh) if is_sharded(other) else x


def part(x: Tensor, placements: Iterable[Any]) -> tuple[int, int]:
    """(first, count) of the rows of x that this process has with `placements`, as torch.chunk divides."""
    first, count = 0, x.shape[0]
    for dim, placement in enumerate(placements):
        if placement.is_shard(0):
            each = -(-count // x.device_mesh.size(dim))
            start = min(count, each * x.device_mesh.get_local_rank(dim))
            first, count = first + start, min(each, count - start)
    return first, count


def same(x: Tensor, mesh: Any) -> Tensor:
    """x of the first process of a mesh, on all."""
    from torch.distributed import broadcast

    for dim in range(mesh.ndim):
        broadcast(x, group=mesh.get_group(dim), group_src=0)
    return x


def run_in_place(op: "Op", args: tuple) -> Any:
    """An op that writes to its arguments, on each device's parts of them.

    They stay where they are, so the others are moved to fit one of the op's splits.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    names = [a.name for a in op.fwd._schema.arguments]
    given = dict(zip(names, args))
    mesh = next(a.device_mesh for a in args if is_sharded(a))
    count = len(op.fwd._schema.returns)
    splits = [Split({}, (None,) * count), *op.splits("fwd", given)]
    written = {name: given[name] for name in op.mutates if is_sharded(given[name])}

    def fits(split: Split, dim: int) -> bool:
        wanted = {name: split.inputs.get(name) for name in written}
        return all(_at(wanted[name]) == t.placements[dim] for name, t in written.items())

    def _at(where: int | None) -> Any:
        return Replicate() if where is None else Shard(where)

    chosen = [next((s for s in splits if fits(s, dim)), None) for dim in range(mesh.ndim)]
    if None in chosen:
        raise ValueError(
            f"{op.name}: {', '.join(f'{name} is {t.placements}' for name, t in written.items())}, expected "
            "them split alike, by sequences or heads, or whole on every device"
        )

    def local(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return whole(value, mesh).redistribute(mesh, [_at(s.inputs.get(name)) for s in chosen]).to_local()

    outs = op.fwd(*(local(name, value) for name, value in given.items()))
    if outs is None:
        return None
    return tuple(
        DTensor.from_local(out, mesh, [_at(s.outputs[i]) for s in chosen], run_check=False)
        for i, out in enumerate(outs)
    )


@cache
def _register(table: tuple) -> None:
    """Make every op of the table known to DTensor."""
    from torch.distributed.tensor.experimental import register_sharding

    for op in table:
        for half in (op.fwd, op.bwd):
            if half is not None and not op.mutates:
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
