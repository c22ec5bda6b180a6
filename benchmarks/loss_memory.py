"""python -m benchmarks.loss_memory: peak memory of linear_cross_entropy against logits and loss apart.

Forward and backward for 8,192 tokens, 50,257 classes and width 768, in a process for each.  The gradients
count; the inputs do not.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llmkern.machine import describe
from llmkern.ops import OPS
from llmkern.ops.op import Make

from .measure import resident_rise

SHAPE = 8192, 50257, 768


def measure(function: str, dtype: str, shape: tuple[int, int, int]) -> int:
    """Bytes by which one call and its backward raise the peak of this process."""
    tokens, classes, width = shape
    make, op = Make(getattr(torch, dtype)), OPS["linear_cross_entropy"]
    x, head = make(tokens, width).requires_grad_(), make(classes, width, scale=width**-0.5).requires_grad_()
    target = make.integers(classes, tokens)
    call = op.public if function == "llmkern" else op.eager
    call(x[:4], head[:5], target[:4] % 5).backward()  # what the first call loads does not count
    x.grad = head.grad = None
    return resident_rise(lambda: call(x, head, target).backward())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if ours takes more than 1/8."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    args = parser.parse_args(argv)
    rows = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for dtype in args.dtype:
            ours, apart = (pool.apply(measure, (name, dtype, SHAPE)) for name in ("llmkern", "torch"))
            rows[dtype] = {"llmkern": ours, "torch": apart, "ratio": apart / ours}
            print(f"{dtype:9} {ours / 2**20:5.0f} MiB, torch {apart / 2**20:5.0f}: {apart / ours:.1f} x less")
    if args.out:
        record = {"shape": SHAPE, "machine": describe("cpu"), "bytes": rows}
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(row["ratio"] < 8 for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
