"""The output layer and its loss, where nobody else sees the logits."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .graph import VIEWS, Rewriter, argument, name, through, used_once, value


def rewrite(graph: Rewriter) -> None:
    """cross_entropy(linear(h, W, b), t) as one op, which never has all logits in memory."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not F.cross_entropy:
            continue
        logits, target = node.args[0], argument(node, 1, "target")
        head = through(logits, VIEWS)
        if head is logits and value(logits).dim() != 2:
            continue
        if name(head) != "linear" or not used_once(head) or not _is_plain(node):
            continue
        if value(logits).dim() != 2 or value(logits).shape[1] != value(head).shape[-1]:
            continue
        options = {key: argument(node, i, key, default) for i, key, default in OPTIONS}
        args = head.args[0], argument(head, 1, "weight"), argument(head, 2, "bias"), target
        graph.replace(
            node,
            head_and_loss,
            args,
            options,
            "F.cross_entropy(F.linear)",
            "llmkern.ops.linear_cross_entropy",
        )


OPTIONS = (
    (2, "weight", None),
    (4, "ignore_index", -100),
    (6, "reduction", "mean"),
    (7, "label_smoothing", 0.0),
)


def _is_plain(node: Any) -> bool:
    target = value(argument(node, 1, "target"))
    old = argument(node, 3, "size_average"), argument(node, 5, "reduce")
    return target is not None and not target.is_floating_point() and target.dim() == 1 and old == (None, None)


def head_and_loss(
    hidden: Tensor, head_weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any
) -> Tensor:
    """`ops.linear_cross_entropy` of hidden states (*, D) and as many targets in a row."""
    return ops.linear_cross_entropy(hidden.flatten(0, -2), head_weight, target, linear_bias=bias, **options)
