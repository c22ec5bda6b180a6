"""Norms written out, and sums that go into a norm."""

import operator
from typing import Any

from torch import fx

from .. import ops
from ..nn import functional
from .graph import Rewriter, argument, dims, dtype, name, used_once, value

CASTS = ("to", "float", "type_as")


def rewrite(graph: Rewriter) -> None:
    """x / sqrt(mean(x²) + eps), times a weight or not, as rms_norm."""
    for node in graph.calls("mul", "div"):
        found = _rms(node)
        if found is None:
            continue
        x, eps = found
        last, weight = _weighted(node)
        if dtype(x) != dtype(last):
            continue
        args = x, (value(x).shape[-1],), weight, eps
        graph.replace(last, functional.rms_norm, args, {}, "x / sqrt(mean(x²) + eps)", "llmkern.ops.rms_norm")


def _rms(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps, if the node is x · rsqrt(mean(x²) + eps) or x / sqrt(mean(x²) + eps)."""
    a, b = node.args[:2]
    orders = [(a, b)] if name(node) == "div" else [(a, b), (b, a)]
    root = "sqrt" if name(node) == "div" else "rsqrt"
    for x, scale in orders:
        if name(scale) == root and (eps := _eps(scale.args[0], x)) is not None:
            while name(x) in CASTS:  # to float32, for the sum alone
                x = x.args[0]
            return x, eps
    return None


def _eps(node: Any, x: Any) -> float | None:
    """eps, if the node is mean(x², -1, keepdim) + eps."""
    if name(node) != "add" or not isinstance(node.args[1], (int, float)):
        return None
    mean = node.args[0]
    if name(mean) != "mean" or argument(mean, 1, "dim") not in (-1, [-1], (-1,)):
        return None
    square = mean.args[0]
    squared = (
        (name(square) == "pow" and square.args[1] == 2 and square.args[0] is x)
        or (name(square) == "square" and square.args[0] is x)
        or (name(square) == "mul" and square.args[0] is x and square.args[1] is x)
    )
    return float(node.args[1]) if squared and argument(mean, 2, "keepdim", False) else None


def _weighted(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The product with a weight that follows, and the weight; or the node itself."""
    last = node
    while used_once(last):
        user = next(iter(last.users))
        if name(user) in CASTS:
            last = user
            continue
        if name(user) == "mul":
            other = user.args[1] if user.args[0] is last else user.args[0]
            if dims(other) == 1 and value(other).shape[0] == value(node).shape[-1]:
                return user, other
        break
    return last, None


def fuse_adds(graph: Rewriter) -> None:
    """Run the residual add x + y inside the kernel of the norm that follows it."""
    kernels = {functional.layer_norm: ops.layer_norm, functional.rms_norm: ops.rms_norm}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in kernels:
            continue
        add = node.args[0]
        if name(add) != "add" or add in graph.written or add.kwargs or not _alike(*add.args[:2]):
            continue
        rest = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
        if any(a.op not in ("placeholder", "get_attr") for a in rest) or any(
            graph.is_written(a) for a in add.args
        ):
            continue
        _fuse_add(graph, node, add, kernels[node.target])


def _fuse_add(graph: Rewriter, node: fx.Node, add: fx.Node, function: Any) -> None:
    x, residual = add.args
    with graph.graph.inserting_before(add):
        both = graph.graph.call_function(function, (x, *node.args[1:]), {**node.kwargs, "residual": residual})
        y, total = (graph.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    for new, old in ((y, node), (total, add)):
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    graph.graph.erase_node(add)


def _alike(x: Any, y: Any) -> bool:
    a, b = value(x), value(y)
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
