"""A captured graph: what a node calls, with which arguments, and how nodes are replaced."""

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..report import Entry

VIEWS = ("view", "reshape", "flatten", "contiguous", "unflatten", "squeeze", "unsqueeze")
ALIASES = {
    "iadd": "add", "imul": "mul", "itruediv": "div", "truediv": "div", "isub": "sub", "__add__": "add",
    "__mul__": "mul", "__matmul__": "matmul", "multiply": "mul", "divide": "div", "swapaxes": "transpose",
    "_softmax": "softmax", "type": "to",
}  # fmt: skip


def name(node: Any) -> str | None:
    """What a node calls: "matmul" for torch.matmul(a, b), a.matmul(b) and a @ b; None if it calls nothing."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.op == "call_method":
        return ALIASES.get(node.target, node.target)
    module = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    if module not in ("torch", "_operator", "operator", "builtins"):
        return None
    target = getattr(node.target, "__name__", None)
    return ALIASES.get(target, target)


def argument(node: fx.Node, index: int, key: str, default: Any = None) -> Any:
    """An argument given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(key, default)


def value(node: Any) -> Any:
    """The fake tensor that a node gives, as far as it is known."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def dims(node: Any) -> int:
    """How many dimensions a node's tensor has; -1 if it is none."""
    v = value(node)
    return v.dim() if isinstance(v, Tensor) else -1


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor."""
    v = value(node)
    return v.dtype if isinstance(v, Tensor) else None


def used_once(node: fx.Node) -> bool:
    """Whether nobody else sees what a node gives."""
    return len(node.users) == 1


def through(node: Any, names: tuple[str, ...]) -> Any:
    """The node behind calls of these names that are used once."""
    while name(node) in names and used_once(node):
        node = node.args[0]
    return node


def dropout(node: fx.Node) -> float | fx.Node:
    """The probability with which a call of F.dropout drops now; a node, if it is an input."""
    on = argument(node, 2, "training", argument(node, 2, "train", True))
    return argument(node, 1, "p", 0.5) if on else 0.0


def before_dropout(node: Any) -> tuple[Any, float | fx.Node]:
    """What goes into a dropout that is used once, and its probability; else the node itself, and 0."""
    if name(node) != "dropout" or not used_once(node):
        return node, 0.0
    return node.args[0], dropout(node)


class Rewriter:
    """A graph on which the passes work.

    Attributes:
        graph: the graph.
        entries: of the report, one for each replacement.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph, self.entries = gm, gm.graph, []
        self.written = {_root(node.args[0]) for node in self.graph.nodes if _writes(node)}

    def calls(self, *names: str) -> Iterator[fx.Node]:
        """The nodes that call one of these, in a list made before anything is replaced."""
        yield from [node for node in self.graph.nodes if name(node) in names]

    def replace(
        self, node: fx.Node, function: Callable, args: tuple, kwargs: dict[str, Any], was: str, now: str,
        at: fx.Node | None = None,
    ) -> bool:  # fmt: skip
        """Put a call of `function` where `node` is, and take away what only it needed.

        Not done when something that was read before is written to in place.
        """
        read = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node)]
        if any(self.is_written(a) for a in read if a not in node.all_input_nodes):
            return False
        path = where(at or node)
        with self.graph.inserting_before(node):
            new = self.graph.call_function(function, args, kwargs)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self.erase(node)
        self.entries.append(Entry(path, was, now))
        return True

    def is_written(self, node: fx.Node) -> bool:
        """Whether something writes to its memory in place: then the order of reads matters."""
        return _root(node) in self.written

    def erase(self, node: fx.Node) -> None:
        """Take a node away if nobody uses it, and then what it alone used."""
        if node.users or node.op in ("placeholder", "output", "get_attr") or _writes(node):
            return
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for each in inputs:
            self.erase(each)

    def finish(self) -> None:
        """Check the graph, and make its code."""
        self.graph.lint()
        self.gm.recompile()


def where(node: fx.Node) -> str:
    """The path of the module that a node comes from, as `h.0.attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"^L\['\w+'\]|\['|'\]|\[|\]|_modules", ".", path)
    return re.sub(r"\.+", ".", path).strip(".")


def _root(node: Any) -> Any:
    """What a node is a view of."""
    while name(node) in (*VIEWS, "transpose", "permute", "getitem", "split", "chunk", "expand", "t"):
        node = node.args[0]
    return node


def _writes(node: fx.Node) -> bool:
    """Whether a node writes to its first argument."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    if node.target is operator.setitem or node.kwargs.get("inplace"):
        return node.target is operator.setitem or len(node.args[0].users) > 1
    target = getattr(node.target, "__name__", "")
    in_place = getattr(node.target, "__module__", "") == "_operator" and target in (
        "iadd", "imul", "isub", "itruediv", "ior", "iand",
    )  # fmt: skip
    return in_place and isinstance(value(node.args[0]), Tensor)
