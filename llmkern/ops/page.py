"""python -m llmkern.ops.page: the page of all ops, `docs/ops.md`, made from the op table."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from .op import OPS, Op

HEAD = """\
# The ops

Made from the op table by `make docs`. Each op has a reference in PyTorch (float64 and every device), a C++
kernel for CPUs and a Triton kernel for GPUs (float32, bfloat16, float16); `llmkern info` tells which of them
this machine has, and `help(llmkern.ops.attention)` shapes, dtypes and errors of each argument.
"""


def page(ops: Iterable[Op]) -> str:
    """The page as Markdown: for each op its formula, signature, source and properties."""
    return "\n".join([HEAD, *map(_section, ops)])


def _section(op: Op) -> str:
    summary = inspect.getdoc(op.public).split("\n\n")[0].replace("\n", " ")
    formula = "\n".join("    " + line.strip() for line in op.formula().splitlines())
    return f"""\
## {op.name}

{summary}

{formula}

```
{op.public.__name__}{_signature(op)}
```

{_properties(op)}{_invariance(op)}
Source: {op.source}.
"""


def _signature(op: Op) -> str:
    """The signature of the public function, wrapped; types are in its help."""
    parameters = inspect.signature(op.public).parameters.values()
    names, keyword_only = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            names.append("*")
            keyword_only = True
        names.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    lines, line = [], "("
    for i, name in enumerate(names):
        piece = name + (", " if i + 1 < len(names) else ")")
        if len(line) + len(piece) > 100:
            lines.append(line.rstrip())
            line = "    "
        line += piece
    return "\n".join([*lines, line])


def _properties(op: Op) -> str:
    if op.mutates:
        return f"Writes in place to {', '.join(op.mutates)}; no gradient."
    if not op.gradients:
        return "For inference: no gradient."
    grads = ", ".join(op.gradients)
    lower = " In the autocast dtype under autocast." if op.lowers else ""
    return f"Gradients of {grads}; double backward through the reference.{lower}"


def _invariance(op: Op) -> str:
    """Whether results have the same bits alone as in a batch."""
    if not op.batched:
        return "\n"
    if op.varies:
        return f"\nAlone and in a batch the last bits of a result may differ: {op.varies}.\n"
    return "\nOn the C++ kernels a result has the same bits alone as in a batch.\n"


if __name__ == "__main__":
    text = page(OPS.values())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text, end="")
