"""python -m benchmarks [OP ...]: measure ops against torch and against the machine's ceilings."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmkern import ceilings, machine
from llmkern.ops import OPS, FallbackWarning

from . import report
from .measure import Clock, Settings
from .peers import HALVES, PEERS
from .suite import cases, run_case

DTYPES = ("float32", "bfloat16", "float16")
HALF_NAMES = {"fwd": ["fwd"], "bwd": ["fwd+bwd"], "both": list(HALVES)}
QUICK = Settings(rounds=3, seconds=0.005, budget=3.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if everything ran, 1 if llmkern failed somewhere, 2 for a wrong command."""
    args = parse(argv)
    settings = QUICK if args.quick else Settings()
    dtypes = [getattr(torch, name) for name in args.dtype]
    cold = args.device == "cuda" and not args.warm
    console = report.make_console()
    deadline = time.monotonic() + 60 * args.minutes
    with console.status("measuring the machine's ceilings"):
        found = ceilings.measure(args.device, dtypes, 0.05 if args.quick else 0.5, cold)
    about, clock = machine.describe(args.device), Clock(args.device, flush=cold)
    path = args.out / f"{file_name(args, about)}.json"
    chosen = args.ops, args.device, dtypes, HALF_NAMES[args.half], args.quick
    with FakeTensorMode():
        left_out = [str(case) for case in cases(*chosen)]
    total, rows = len(left_out), []
    with progress(console) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # the table tells what ran, the notes why
        task = bar.add_task("", total=total)
        for case in cases(*chosen):
            if time.monotonic() > deadline:
                break
            bar.update(task, description=str(case))
            if not console.is_terminal:
                console.print(f"{total - len(left_out) + 1}/{total} {case}")
            rows += run_case(case, args.device, args.peers, clock, found, settings)
            left_out.pop(0)
            report.save(path, about, found, settings._asdict(), rows, left_out)
            bar.advance(task)
    rows.sort(key=lambda row: (args.ops.index(row.op), row.dtype))  # stable: peers of a case stay together
    report.show(console, rows, args.peers, found)
    if left_out:
        console.print(f"left out after {args.minutes:g} minutes: {len(left_out)} of {total} cases")
    console.print(f"saved {path}")
    if args.plot:
        from .plot import bars

        bars(path.with_suffix(".png"), rows, about)
        console.print(f"saved {path.with_suffix('.png')}")
    return int(any(row.error for row in rows if row.peer == "llmkern"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--dtype", type=_names(DTYPES), default="float32,bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--half", choices=HALF_NAMES, default="both", help="bwd: forward and backward")
    parser.add_argument("--peers", type=_names(PEERS), default=",".join(PEERS), help=", ".join(PEERS))
    parser.add_argument("--quick", action="store_true", help="one sample of each op, short measurements")
    parser.add_argument("--warm", action="store_true", help="GPU: leave inputs in the L2 cache between calls")
    parser.add_argument("--minutes", type=float, default=60, help="leave out the cases that start later")
    parser.add_argument("--plot", action="store_true", help="save a PNG too (needs llmkern[plot])")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    args.ops = args.ops or list(OPS)
    for name in args.ops:
        if name not in OPS:
            parser.error(f"OP is {name!r}, expected one of {', '.join(OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU here; use --device cpu")
    return args


def _names(allowed: Sequence[str]):
    def split(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return split


def file_name(args: argparse.Namespace, about: dict) -> str:
    """Device and date, and what keeps a partial run from passing for a whole one."""
    some = [] if args.ops == list(OPS) else args.ops
    parts = [machine.slug(about["device"]), about["date"], *some, *(["quick"] if args.quick else [])]
    return "-".join(parts)


def progress(console: report.Console) -> Progress:
    """A bar with the name of the case that runs."""
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
