"""python -m benchmarks.targets: every speed target of the CPU kernels, measured in one run.

A target is a ratio against the fastest peer, the median over interleaved rounds, and for some also a
fraction of the ceiling that was measured just before.  Peers are eager torch and torch.compile; for AdamW
torch's own settings; for scaling the same op on one thread.
"""

import argparse
import gc
import importlib.util
import json
import math
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

import llmkern
from llmkern import ceilings, machine
from llmkern.ceilings import dtype_name
from llmkern.ops import OPS
from llmkern.ops.op import Make

from . import report, step
from .measure import Call, Clock, Settings, interleave, ratio
from .peers import calls
from .suite import Case, run_case

PEERS = ["llmkern", "eager", "compile"]
SETTINGS = Settings(rounds=7, seconds=0.02, budget=3.0)
STEP_SETTINGS = Settings(rounds=7, seconds=0.02, budget=15.0)
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
    Target("linear_cross_entropy", "2048x50257", FLOAT, "fwd+bwd", 1.2),
    Target("linear_cross_entropy", "2048x50257", HALF, "fwd+bwd", 1.2),
]
SCALING = 1.85  # from one thread to two
SCALED = ("linear", "ffn", "attention", "layer_norm")  # their first benchmark samples
ADAMW = {"default": 5.0, "fused": 1.0}  # settings of torch.optim.AdamW -> how many times faster
ADAMW_SHAPES = [(1536, 384)] * 52  # 31 M parameters
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


def scaling_verdicts(clock: Clock) -> Iterator[Verdict]:
    threads = torch.get_num_threads()
    for name in SCALED if threads > 1 else ():
        op = OPS[name]
        sample = next(op.benchmarks(Make(FLOAT)))
        call = calls(op, sample, "fwd", ["llmkern"])["llmkern"]

        def on(count: int, call: Call = call) -> Call:
            def run() -> None:
                torch.set_num_threads(count)
                call()

            return run

        times = interleave(clock, {"2 threads": on(2), "1 thread": on(1)}, SETTINGS)
        torch.set_num_threads(threads)
        both, one = times["2 threads"], times["1 thread"]
        what = f"scaling of {name} {sample.label}"
        yield Verdict(what, dtype_name(FLOAT), "fwd", median(both), {"1 thread": ratio(one, both)}, SCALING)


def adamw_verdicts(clock: Clock) -> Iterator[Verdict]:
    def stepper(cls: type, **options: bool) -> Call:
        parameters = [torch.randn(shape).requires_grad_() for shape in ADAMW_SHAPES]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return cls(parameters, **options).step

    steps = {"llmkern": stepper(llmkern.optim.AdamW), "default": stepper(torch.optim.AdamW)}
    steps["fused"] = stepper(torch.optim.AdamW, fused=True)
    times = interleave(clock, steps, SETTINGS)
    ours = times.pop("llmkern")
    for peer, goal in ADAMW.items():
        what = f"AdamW, {sum(math.prod(s) for s in ADAMW_SHAPES) / 1e6:.0f} M parameters"
        yield Verdict(what, dtype_name(FLOAT), "step", median(ours), {peer: ratio(times[peer], ours)}, goal)


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
    table.add_column("times faster than")
    for name in ("wanted", "ms", "ceiling", "wanted", ""):
        table.add_column(name, justify="right")
    for v in verdicts:
        wanted = "-" if v.ceiling_target is None else f"{v.ceiling_target:.0%}"
        table.add_row(
            v.what, v.dtype, v.half, ", ".join(f"{peer} {times:.2f}" for peer, times in v.peers.items()),
            f"{v.target:.2f}", f"{1e3 * v.seconds:.2f}",
            "-" if v.ceiling is None else f"{v.ceiling:.0%}", wanted,
            "[green]reached[/]" if v.ok else "[red]missed[/]",
        )  # fmt: skip
    console.print(table)
    reached = sum(v.ok for v in verdicts)
    console.print(f"{reached} of {len(verdicts)} targets reached; ceilings: {found}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, whatever was reached: a busy machine must not fail a build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--only", choices=("ops", "scaling", "adamw", "steps"), help="one part alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    console, start = report.make_console(), time.monotonic()
    clock = Clock("cpu")
    with console.status("measuring the machine's ceilings"):
        found = ceilings.measure("cpu", [FLOAT, HALF], 0.5, False)
    verdicts: list[Verdict] = []
    parts = {
        "ops": lambda: op_verdicts(clock, found),
        "scaling": lambda: scaling_verdicts(clock),
        "adamw": lambda: adamw_verdicts(clock),
        "steps": lambda: step_verdicts(clock),
    }
    for name, part in parts.items():
        for verdict in part() if args.only in (None, name) else ():
            verdicts.append(verdict)
            console.print(f"{verdict.what} {verdict.dtype} {verdict.half}: {verdict.reached:.2f} x")
    show(console, verdicts, found)
    about = machine.describe("cpu")
    path = args.out / f"targets-{about['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(v), "reached": v.reached, "ok": v.ok} for v in verdicts]
    path.write_text(json.dumps({"machine": about, "targets": rows}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib"):
        from . import plot

        plot.targets(path.with_suffix(".png"), verdicts, about)
    console.print(f"saved {path} after {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
