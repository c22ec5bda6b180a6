"""Calls of functions that llmkern has as they are: F.layer_norm, F.linear, ..."""

import torch

from ..nn.functional import KERNELS
from ..nn.linear import linear
from .graph import Rewriter, argument, dims, value

DIRECT = {**KERNELS, torch.rms_norm: KERNELS[torch.nn.functional.rms_norm]}


def rewrite(graph: Rewriter) -> None:
    """Call llmkern's functions in place of torch's."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in DIRECT:
            function = DIRECT[node.target][1]
            was, now = node.target.__name__, f"llmkern.nn.functional.{function.__name__}"
            graph.replace(node, function, node.args, dict(node.kwargs), f"F.{was}", now)
        elif node.target in (torch.nn.functional.linear, torch.addmm) and _on_cpu(node):
            _linear(graph, node)


def _on_cpu(node) -> bool:
    v = value(node)
    return v is not None and v.device.type == "cpu" and v.is_floating_point()


def _linear(graph: Rewriter, node) -> None:
    if node.target is torch.nn.functional.linear:
        x, weight, bias = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
        graph.replace(node, linear, (x, weight, bias), {}, "F.linear", "llmkern.ops.linear")
    elif set(node.kwargs) <= {"input", "mat1", "mat2"} and dims(argument(node, 0, "input")) == 1:
        bias, x, weight = (argument(node, i, key) for i, key in enumerate(("input", "mat1", "mat2")))
        with graph.graph.inserting_before(node):
            turned = graph.graph.call_method("t", (weight,))
        turned.meta["example_value"] = value(weight).t()
        graph.replace(node, linear, (x, turned, bias), {}, "torch.addmm", "llmkern.ops.linear")
