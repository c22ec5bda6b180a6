"""`torch.compile(model, backend="llmkern")`: kernels for code of any shape.

TorchDynamo captures what a model calls; the passes here find attention, norms, feed-forward layers and
losses in that graph, however they are written, and put llmkern's ops there.  The graph then runs eagerly,
with autograd, or goes on to another backend: `options={"then": "inductor"}`.

    model = torch.compile(model, backend="llmkern")
    model(batch)
    print(llmkern.backend.report)     # what was replaced, in which module
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ..report import NoEffectWarning, Report
from . import attention, ffn, functions, loss, norm
from .graph import Rewriter

PASSES = (attention.rewrite, norm.rewrite, loss.rewrite, ffn.rewrite, functions.rewrite, norm.fuse_adds)


class Backend:
    """A backend of torch.compile.

    Attributes:
        report: what was replaced in all graphs so far; `reset()` empties it.
    """

    __name__ = "llmkern"

    def __init__(self) -> None:
        self.report = Report()

    def reset(self) -> None:
        """Forget what was replaced."""
        self.report = Report()

    def __call__(
        self, gm: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Callable[..., Any]:
        """Rewrite the graph and compile it.

        Args:
            gm: what TorchDynamo captured.
            inputs: examples of its inputs.
            options: {"then": name of another backend}; without it the graph runs eagerly.

        Raises:
            ValueError: another option.
        """
        options = dict(options or {})
        then = options.pop("then", "eager")
        if options:
            raise ValueError(f"backend 'llmkern': unknown option {next(iter(options))!r}, expected 'then'")
        entries = rewrite(gm)
        self.report.entries.extend(entries)
        if not entries:
            message = "torch.compile(backend='llmkern') found nothing to replace in a graph"
            warnings.warn(message, NoEffectWarning, stacklevel=2)
        if then == "eager":
            return gm.forward
        import torch._dynamo

        return torch._dynamo.lookup_backend(then)(gm, inputs)


def rewrite(gm: fx.GraphModule) -> list:
    """Replace what is found in the graph, in place; returns the entries of the report."""
    rewriter = Rewriter(gm)
    for run in PASSES:
        run(rewriter)
    rewriter.finish()
    return rewriter.entries


backend = Backend()
