"""Who is measured: our op, the same by torch eager and torch.compile, and our own reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import _cpu
from llmkern.ceilings import Bound, Ceilings
from llmkern.ops import use
from llmkern.ops.dispatch import tensors
from llmkern.ops.explain import Choice, Listen
from llmkern.ops.op import Op, Sample, cost, differentiable

from .measure import Call

PEERS = ("llmkern", "eager", "compile", "reference")
HALVES = {"fwd": ("fwd",), "fwd+bwd": ("fwd", "bwd")}  # what is measured -> halves of the op that run


def calls(op: Op, sample: Sample, half: str, names: list[str]) -> dict[str, Call]:
    """For each peer a function without arguments that runs `half` of the op on `sample`."""
    functions = {
        "llmkern": op.public,
        "eager": op.eager,
        # fullgraph: a graph break must not pass for a compiled op
        "compile": torch.compile(op.eager, fullgraph=True, dynamic=False),
        "reference": op.public,
    }
    make = forward if half == "fwd" else forward_backward
    result = {name: make(op, functions[name], sample) for name in names}
    if "reference" in result:
        result["reference"] = _on_reference(result["reference"])
    return result


def forward(op: Op, function: Callable[..., Any], sample: Sample) -> Call:
    def call():
        with torch.no_grad():
            return function(*sample.args, **sample.kwargs)

    return call


def forward_backward(op: Op, function: Callable[..., Any], sample: Sample) -> Call:
    inputs = [t.requires_grad_() for t in differentiable(op, sample)]
    grads: list[Tensor] = []

    def call():
        outs = function(*sample.args, **sample.kwargs)
        outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]
        if not grads:
            grads.extend(torch.randn_like(out) for out in outs)
        return torch.autograd.grad(outs, inputs, grads)

    return call


def _on_reference(call: Call) -> Call:
    def on_reference():
        with use("reference"):
            return call()

    return on_reference


def examine(op: Op, sample: Sample, half: str, ceilings: Ceilings) -> tuple[Bound, list[Choice]]:
    """The bound of this case, and which implementation llmkern takes for each half that runs."""
    (call,) = calls(op, sample, half, ["llmkern"]).values()
    with Listen(op) as heard:
        call()
    dtype = next(t.dtype for t in tensors(heard.args["fwd"]) if t.is_floating_point())
    bound = sum((ceilings.bound(cost(op, h, *heard.args[h]), dtype) for h in HALVES[half]), Bound())
    return bound, [heard.choice(h) for h in HALVES[half]]


def backend_name(choices: list[Choice]) -> str:
    """The implementations that ran: "cpp:avx2", or "triton / reference" where backward differs."""
    names = [f"cpp:{_cpu.best()}" if c.backend == "cpp" else c.backend for c in choices]
    return " / ".join(dict.fromkeys(names))


def reasons(choices: list[Choice]) -> list[str]:
    """Why not the fast kernel, for each half where it was not."""
    return list(dict.fromkeys(c.reason for c in choices if c.reason))
