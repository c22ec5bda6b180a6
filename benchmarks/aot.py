"""python -m benchmarks.aot: compile every Triton kernel for GPUs that are not here, and check the code.

A kernel fails if it spills registers, wants more shared memory than the GPU has, misses the tensor-core
instruction of its GPU in 16 bits, uses TF32 where float32 was promised, or adds atomically.  What each
kernel's default configuration takes stands in benchmarks/results/aot.csv; one that takes more than that
fails too, and so does one that takes much less, or that is not there: then the table is old.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from llmkern.ops.op import OPS

from . import aot_table
from .aot_compile import ALL_TARGETS, DTYPES, MORE_TARGETS, TARGETS, Compiled, compile_in_parallel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a kernel has a problem or takes more than it did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to compile (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--target", nargs="+", choices=list(ALL_TARGETS), default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help=f"also for {', '.join(MORE_TARGETS)}")
    parser.add_argument("--once", action="store_true", help="only the first launch of each kernel")
    parser.add_argument("--failed", action="store_true", help="print only kernels with a problem")
    parser.add_argument("--write", action="store_true", help=f"with --once: renew {aot_table.PATH.name}")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"unknown op {', '.join(unknown)}, expected one of {', '.join(OPS)}")
    if args.write and not args.once:
        parser.error("--write needs --once: the table holds the first launch of each kernel")
    targets = list(ALL_TARGETS) if args.all else args.target
    rows, failed = [], 0
    known = {} if args.write else aot_table.load()
    for group in compile_in_parallel(targets, args.dtype, args.ops or list(OPS), args.once):
        for row in group:
            problems = (*row.problems, *aot_table.differences(row, known))
            failed += bool(problems)
            if problems or not args.failed:
                print(line(row, problems), flush=True)
        rows += group
        if args.write:
            aot_table.save(group)
    print(f"{len(rows)} kernels compiled for {', '.join(targets)}: {failed} with a problem")
    return int(failed > 0)


def line(row: Compiled, problems: Sequence[str]) -> str:
    """One kernel for people."""
    code = row.code
    return (
        f"{row.target:7} {row.dtype:9} {row.kernel:22} {row.op + ' ' + row.case:38} warps {row.warps:2} "
        f"registers {code.registers:3} shared {row.shared:6} instructions {code.instructions:5} "
        f"wide {code.wide:4.0%} {code.tensor:16} " + ("; ".join(problems) or "ok")
    )


if __name__ == "__main__":
    sys.exit(main())
