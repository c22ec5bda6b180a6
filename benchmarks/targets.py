"""python -m benchmarks.targets: every speed target of the CPU kernels, measured in one run.

A target is a ratio against the fastest of eager torch and torch.compile, the median over interleaved
rounds, and for some also a fraction of the ceiling that was measured just before.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from llmkern.ops import OPS
from llmkern.ops.op import Make

from . import ceilings, machine, report, step
from .ceilings import dtype_name
from .measure import Clock, Settings, interleave, ratio
from .suite import Case, run_case

PEERS = ["llmkern", "eager", "compile"]
SETTINGS = Settings(rounds=7, seconds=0.02, budget=6.0)
STEP_SETTINGS = Settings(rounds=7, seconds=0.02, budget=25.0)
FLOAT, HALF = torch.float32, torch.bfloat16


class Target(NamedTuple):
    """What one half of an op must reach on each of its benchmark samples whose label begins so."""

    op: str
    label: str
    dtype: torch.dtype
    half: str
    ratio: float
    ceiling: float | None = None


TARGETS = [
    Target("linear", "2048", FLOAT, "fwd", 1.25, 0.85),
    Target("linear", "2048", HALF, "fwd", 1.05, 0.87),
    Target("ffn", "2048", FLOAT, "fwd+bwd", 1.25),
    Target("ffn", "2048", HALF, "fwd+bwd", 1.15),
    Target("attention", "", FLOAT, "fwd", 2.0),
    Target("attention", "", FLOAT, "fwd+bwd", 2.0),
    Target("attention", "", HALF, "fwd", 3.0),
    Target("attention", "", HALF, "fwd+bwd", 3.0),
    Target("layer_norm", "4096x768", FLOAT, "fwd+bwd", 3.0),
    Target("layer_norm", "4096x4096", FLOAT, "fwd+bwd", 3.0, 0.8),
    Target("rms_norm", "4096x768", FLOAT, "fwd+bwd", 8.0),
    Target("rms_norm", "4096x4096", FLOAT, "fwd+bwd", 8.0, 0.8),
    Target("cross_entropy", "2048x50257", FLOAT, "fwd+bwd", 2.0),
    Target("cross_entropy", "2048x50257", HALF, "fwd+bwd", 2.0),
]
STEP_TARGETS = {  # name of the step -> ratio in float32 and under bfloat16 autocast
    "4 x 128, 12 x 64": (1.5, 1.5),
    "6 x 384, 12 x 256": (1.3, 1.5),
    "GPT-2 124M, 2 x 512": (1.6, 1.6),
}


@dataclass
class Verdict:
    """One target and what was reached; times in seconds."""

    what: str
    dtype: str
    half: str
    seconds: float
    peers: dict[str, float]  # peer -> times faster than it
    target: float
    ceiling: float | None = None
    ceiling_target: float | None = None

    @property
    def reached(self) -> float:
        return min(self.peers.values())

    @property
    def ok(self) -> bool:
        enough = self.ceiling_target is None or (self.ceiling or 0) >= self.ceiling_target
        return self.reached >= self.target and enough


def op_verdicts(clock: Clock, found: ceilings.Ceilings) -> Iterator[Verdict]:
    for target in TARGETS:
        op = OPS[target.op]
        for sample in op.benchmarks(Make(target.dtype)):
            if not sample.label.startswith(target.label):
                continue
            case = Case(op, sample, target.dtype, target.half)
            rows = {row.peer: row for row in run_case(case, "cpu", PEERS, clock, found, SETTINGS)}
            ours = rows.pop("llmkern")
            yield Verdict(
                f"{op.name} {sample.label}", dtype_name(target.dtype), target.half, ours.median_s,
                {peer: row.speedup for peer, row in rows.items() if row.speedup is not None},
                target.ratio, ours.ceiling, target.ceiling,
            )  # fmt: skip


def step_verdicts(clock: Clock) -> Iterator[Verdict]:
    for case in step.steps():
        torch.compiler.reset()
        gc.collect()
        calls = step.calls(case, PEERS)
        for call in calls.values():
            call()
        times = interleave(clock, calls, STEP_SETTINGS)
        ours = times.pop("llmkern")
        goal = STEP_TARGETS[case.name][case.dtype == HALF]
        peers = {peer: ratio(values, ours) for peer, values in times.items()}
        yield Verdict(f"step {case.name}", dtype_name(case.dtype), "step", median(ours), peers, goal)


def show(console: Console, verdicts: list[Verdict], found: ceilings.Ceilings) -> None:
    table = Table(header_style="bold")
    for name in ("target", "dtype", "half"):
        table.add_column(name)
    for name in ("ms", "× eager", "× compile", "wanted", "ceiling", "wanted", ""):
        table.add_column(name, justify="right")
    for v in verdicts:
        wanted = "-" if v.ceiling_target is None else f"{v.ceiling_target:.0%}"
        table.add_row(
            v.what, v.dtype, v.half, f"{1e3 * v.seconds:.2f}",
            *(f"{v.peers[peer]:.2f}" if peer in v.peers else "-" for peer in PEERS[1:]),
            f"{v.target:.2f}", "-" if v.ceiling is None else f"{v.ceiling:.0%}", wanted,
            "[green]reached[/]" if v.ok else "[red]missed[/]",
        )  # fmt: skip
    console.print(table)
    reached = sum(v.ok for v in verdicts)
    console.print(f"{reached} of {len(verdicts)} targets reached; ceilings: {found}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, whatever was reached: a busy machine must not fail a build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--only", choices=("ops", "steps"), help="one part alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    console, start = report.make_console(), time.monotonic()
    clock = Clock("cpu")
    with console.status("measuring the machine's ceilings"):
        found = ceilings.measure("cpu", [FLOAT, HALF], 0.5, False)
    verdicts: list[Verdict] = []
    for name, part in (("ops", lambda: op_verdicts(clock, found)), ("steps", lambda: step_verdicts(clock))):
        for verdict in part() if args.only in (None, name) else ():
            verdicts.append(verdict)
            console.print(f"{verdict.what} {verdict.dtype} {verdict.half}: {verdict.reached:.2f} x")
    show(console, verdicts, found)
    about = machine.describe("cpu")
    path = args.out / f"targets-{about['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(v), "reached": v.reached, "ok": v.ok} for v in verdicts]
    path.write_text(json.dumps({"machine": about, "targets": rows}, indent=1) + "\n")
    console.print(f"saved {path} after {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
