"""softmax(Q Kᵀ) V written out (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2.1), in any spelling."""

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from ..nn.functional import scaled_dot_product_attention
from .graph import Rewriter, argument, before_dropout, dims, dtype, name, through, used_once, value

CASTS = ("to", "float", "type_as")
RANDOM = ("dropout", "rand", "randn", "bernoulli", "rand_like", "randn_like")
FARTHEST = -1e9  # a score of this or less is a masked one


class Scores(NamedTuple):
    """What goes into the softmax: scale · q kᵀ, masked."""

    query: fx.Node
    key: fx.Node  # transposed back
    scale: float
    hidden: fx.Node | None  # a mask, True is left out
    added: fx.Node | None  # a mask to add


def rewrite(graph: Rewriter) -> None:
    """Put scaled_dot_product_attention in the place of products, softmax and masks."""
    for node in graph.calls("matmul", "bmm"):
        if dims(node) != 4:
            continue
        weights, dropout_p = before_dropout(through(node.args[0], CASTS))
        weights = through(weights, CASTS)
        if name(weights) != "softmax" or not used_once(weights) or argument(weights, 1, "dim") not in (-1, 3):
            continue
        found = _scores(graph, weights.args[0])
        if found is None or dtype(found.query) != dtype(node.args[1]):
            continue
        mask, causal = _mask(graph, node, found)
        args = found.query, found.key, node.args[1], mask, dropout_p, causal, found.scale
        graph.replace(
            node, scaled_dot_product_attention, args, {}, "softmax(Q Kᵀ) V", "llmkern.ops.attention"
        )


def _scores(graph: Rewriter, node: Any) -> Scores | None:
    """Peel masks, then the scale, off the product of queries and keys."""
    hidden = added = None
    node = through(node, CASTS)
    while isinstance(node, fx.Node) and used_once(node):
        if name(node) == "masked_fill" and hidden is None and _is_far(argument(node, 2, "value")):
            hidden, node = argument(node, 1, "mask"), node.args[0]
        elif name(node) == "add" and added is None and _is_mask(node.args[1], node):
            added, node = node.args[1], node.args[0]
        else:
            break
        node = through(node, CASTS)
    scale, node = _scale(node)
    node = through(node, CASTS)
    if name(node) not in ("matmul", "bmm") or not used_once(node):
        return None
    key = _turned(graph, node.args[1])
    return None if key is None else Scores(node.args[0], key, scale, hidden, added)


def _is_far(fill: Any) -> bool:
    return isinstance(fill, (int, float)) and fill <= FARTHEST


def _is_mask(mask: Any, scores: fx.Node) -> bool:
    """Whether it is a floating-point mask that broadcasts to the scores, not scores of another kind."""
    v, whole = value(mask), value(scores)
    if v is None or not v.is_floating_point() or v.dim() > 4 or v.requires_grad:
        return False
    return all(a == b or a == 1 for a, b in zip(v.shape[::-1], whole.shape[::-1]))


def _scale(node: Any) -> tuple[float, Any]:
    if name(node) in ("mul", "div") and used_once(node) and isinstance(node.args[1], (int, float)):
        factor = float(node.args[1])
        return factor if name(node) == "mul" else 1.0 / factor, node.args[0]
    return 1.0, node


def _turned(graph: Rewriter, node: Any) -> fx.Node | None:
    """The keys, (B, H, S, D), of which `node` is the transpose."""
    if name(node) == "transpose" and {d % 4 for d in node.args[1:3]} == {2, 3}:
        return node.args[0]
    if name(node) == "permute" and dims(node) == 4:
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        with graph.graph.inserting_after(node):
            turned = graph.graph.call_method("transpose", (node, 2, 3))
        turned.meta["example_value"] = value(node).transpose(2, 3)
        return turned if len(order) == 4 else None
    return None


def _mask(graph: Rewriter, node: fx.Node, found: Scores) -> tuple[fx.Node | None, bool]:
    """(mask, is causal): one mask in which True takes part, or one to add."""
    if found.hidden is None and found.added is None:
        return None, False
    if found.added is None and _is_causal(found.hidden, value(found.query).shape[2]):
        return None, True
    with graph.graph.inserting_before(node):
        if found.hidden is None:
            return found.added, False
        if found.added is None:
            seen = graph.graph.call_function(torch.logical_not, (found.hidden,))
            seen.meta["example_value"] = value(found.hidden)
            return seen, False
        both = graph.graph.call_function(torch.masked_fill, (found.added, found.hidden, -math.inf))
        both.meta["example_value"] = value(found.added)
        return both, False


def _is_causal(hidden: Any, length: Any) -> bool:
    """Whether the mask hides the keys behind each query: told for masks made in the graph from constants."""
    if not isinstance(length, int):
        return False
    try:
        mask = _constant(hidden, {})
    except _NotConstant:
        return False
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return mask.shape[-2:] == later.shape and bool((mask == later).all())


class _NotConstant(Exception):
    pass


def _constant(node: Any, known: dict) -> Any:
    """What a node gives, if it depends on no input."""
    if not isinstance(node, fx.Node):
        return node
    if name(node) is None or name(node) in RANDOM:
        raise _NotConstant
    if node not in known:
        args = fx.map_arg(node.args, lambda n: _constant(n, known))
        kwargs = {k: _constant(v, known) for k, v in node.kwargs.items() if k != "device"}
        if node.op == "call_method":
            known[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            known[node] = node.target(*args, **kwargs)
    return known[node]
