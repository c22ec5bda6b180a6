"""python -m benchmarks.gpu_sanitize OP: 20 small cases of an op, for compute-sanitizer to watch.

`python -m benchmarks.gpu --sanitize` starts it under memcheck and racecheck for every op.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmkern.machine import ROOT
from llmkern.ops import OPS, use
from llmkern.ops.op import Make, differentiable

TOOLS = ("memcheck", "racecheck")
CASES = 20
SECONDS = 600  # of one op under one tool


def main(argv: Sequence[str]) -> int:
    """Run the cases of one op on the GPU."""
    op = OPS[argv[0]]
    for sample in islice(op.samples(Make(torch.bfloat16, "cuda")), CASES):
        inputs = [t.requires_grad_() for t in differentiable(op, sample)] if op.gradients else []
        with use("triton"):
            outs = tree_leaves(op.public(*sample.args, **sample.kwargs))
            outs = [o for o in outs if isinstance(o, Tensor) and o.requires_grad]
            if outs:
                torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs], allow_unused=True)
    torch.cuda.synchronize()
    return 0


def sanitize(out: Path) -> bool:
    """Every op under every tool; logs to `out`; False if one found something."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return False
    clean = True
    for check in TOOLS:
        for name in OPS:
            log = out / f"sanitizer-{check}-{name}.txt"
            command = [
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "9",
                sys.executable,
                "-m",
                __spec__.name,
                name,
            ]
            with log.open("w") as file:
                try:
                    code = subprocess.run(
                        command, cwd=ROOT, stdout=file, stderr=file, timeout=SECONDS
                    ).returncode
                except subprocess.TimeoutExpired:
                    code = f"stopped after {SECONDS} s"
            clean &= code == 0
            print(f"{check} {name}: {'clean' if code == 0 else f'{code}, see {log}'}", flush=True)
    return clean


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
