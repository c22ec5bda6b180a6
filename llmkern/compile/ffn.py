"""Linear, activation, linear, with or without a gate and dropout, in any module or in none."""

from typing import Any, NamedTuple

from torch import fx

from .. import ops
from .graph import Rewriter, argument, before_dropout, dropout, dtype, name, used_once

NAMES = {"relu": "relu", "silu": "silu"}


class Linear(NamedTuple):
    """A call of F.linear."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def rewrite(graph: Rewriter) -> None:
    """Both products and what is between them as one op."""
    for node in graph.calls("linear"):
        out = _linear(node)
        hidden, dropout_p = before_dropout(out.x)
        found = _activated(hidden) or _gated(hidden)
        if found is None:
            continue
        activation, first, gate = found
        if dtype(first.x) != dtype(node):  # under autocast: rounded as torch rounds it
            continue
        last, output_dropout_p = _drop_behind(node)
        args = first.x, first.weight, first.bias, out.weight, out.bias, activation
        kwargs: dict[str, Any] = dict(dropout_p=dropout_p, output_dropout_p=output_dropout_p)
        if gate is not None:
            kwargs |= dict(weight_gate=gate.weight, bias_gate=gate.bias)
        graph.replace(last, ops.ffn, args, kwargs, "linear, activation, linear", "llmkern.ops.ffn", at=node)


def _linear(node: fx.Node) -> Linear:
    return Linear(node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias"))


def _activated(node: Any) -> tuple[str, Linear, None] | None:
    """(activation, its linear, None)."""
    activation = _activation(node)
    if activation is None or not used_once(node) or name(node.args[0]) != "linear":
        return None
    first = node.args[0]
    return (activation, _linear(first), None) if used_once(first) else None


def _gated(node: Any) -> tuple[str, Linear, Linear] | None:
    """(activation, linear, linear whose output goes through the activation), multiplied."""
    if name(node) != "mul" or not used_once(node) or len(node.args) != 2:
        return None
    for gate, up in (node.args, node.args[::-1]):
        found = _activated(gate)
        if found and name(up) == "linear" and used_once(up) and _linear(up).x is found[1].x:
            return found[0], _linear(up), found[1]
    return None


def _activation(node: Any) -> str | None:
    if name(node) == "gelu":
        return "gelu_tanh" if argument(node, 1, "approximate", "none") == "tanh" else "gelu"
    return NAMES.get(name(node))


def _drop_behind(node: fx.Node) -> tuple[fx.Node, float | fx.Node]:
    """The dropout behind a node, if it is all that uses it, and its probability."""
    user = next(iter(node.users)) if used_once(node) else None
    if name(user) != "dropout":
        return node, 0.0
    return user, dropout(user)
