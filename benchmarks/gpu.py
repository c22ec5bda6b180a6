"""python -m benchmarks.gpu: on a GPU, the tests, then every target with its peers, in 8 minutes.

Results go to benchmarks/results/<gpu>-<date>.json and .txt, to be committed.  `--dry-run` goes the same way
on a CPU with tiny shapes, so that the command itself can be tested where there is no GPU; `--list` names
targets and peers.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from llmkern import ceilings, machine

from . import gpu_peers, gpu_sanitize, gpu_steps
from .gpu_measure import Verdict, measure
from .gpu_targets import goals
from .measure import Clock, Settings, interleave, peak_bytes, ratio

TEST_SECONDS = 180
TARGET_SECONDS = 250  # no target starts later
SETTINGS = Settings(rounds=5, seconds=0.02, budget=3.0)
DRY = Settings(rounds=1, seconds=0.0, budget=1.0)
SCALE = 128  # of the sizes in a dry run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 if tests passed and everything ran, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--tests", default="gpu", metavar="EXPRESSION", help="pytest -m; default: gpu")
    parser.add_argument("--only", choices=("tests", "targets", "steps"), help="one part alone")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer in place of all this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; times mean nothing")
    parser.add_argument("--list", action="store_true", help="print targets and peers, and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        return show()
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        message = "torch sees no GPU here; run this on a machine with one and a torch built for it"
        print(message + ", or try --dry-run", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sanitize:
        return int(not gpu_sanitize.sanitize(args.out))
    about = machine.describe(device)
    name = "dry-run" if args.dry_run else f"{machine.slug(about['device'])}-{about['date']}"
    passed, verdicts, steps = True, [], []
    if args.only in (None, "tests") and not args.dry_run:
        passed = run_tests(args.tests, args.out / f"{name}-tests.txt")
    end = time.monotonic() + TARGET_SECONDS
    if args.only in (None, "targets"):
        verdicts = list(run_targets(device, end))
    if args.only in (None, "steps"):
        steps = list(run_steps(device, end))
    save(args.out / name, about, passed, verdicts, steps)
    failed = [v for v in verdicts if any("llmkern failed" in m for m in v.missed)]
    return int(not passed or bool(failed))


def run_tests(expression: str, log: Path) -> bool:
    """pytest in a process of its own, within its time."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-m", expression]
    print(f"{' '.join(command[1:])}  (at most {TEST_SECONDS} s)", flush=True)
    with log.open("w") as file:
        try:
            box = {"cwd": machine.ROOT, "stdout": file, "stderr": file, "timeout": TEST_SECONDS}
            code = subprocess.run(command, **box).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {TEST_SECONDS} s\n")
            code = -1
    print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), flush=True)
    return code == 0


def run_targets(device: str, end: float) -> Iterator[Verdict]:
    """Every target, until time is up; then they say so."""
    dry = device == "cpu"
    clock = Clock(device, flush=True)
    found = ceilings.measure(device, [torch.bfloat16], 0.01 if dry else 0.5, not dry)
    print(f"ceilings: {found}", flush=True)
    for goal in goals():
        if time.monotonic() > end:
            yield Verdict(goal.op, goal.half, goal.label, missed=["not measured: time was up"])
            continue
        verdict = measure(goal, device, SCALE if dry else 1, clock, found, DRY if dry else SETTINGS)
        print(line(verdict), flush=True)
        yield verdict


def run_steps(device: str, end: float) -> Iterator[dict]:
    """Training steps, one peer after another in memory, but all of a model in the same minute."""
    dry = device == "cpu"
    for model in gpu_steps.models():
        row = {"model": model.name, "seconds": {}, "peak_bytes": {}, "absent": {}, "missed": []}
        times = {}
        for peer, make in gpu_steps.calls(model, device, SCALE if dry else 1):
            if isinstance(make, str) or time.monotonic() > end:
                row["absent"][peer] = make if isinstance(make, str) else "time was up"
                continue
            try:
                times[peer], row["peak_bytes"][peer] = one_step(make, device, DRY if dry else SETTINGS)
            except Exception as error:  # whatever stops a peer stands in the results
                row["absent"][peer] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        row["seconds"] = {peer: median(values) for peer, values in times.items()}
        for peer, wanted in model.against.items() if "llmkern" in times and not dry else ():
            faster = ratio(times[peer], times["llmkern"]) if peer in times else wanted
            if faster < wanted:
                row["missed"].append(f"{faster:.2f} times {peer}, wanted {wanted}")
        print(f"step {model.name}: {row}", flush=True)
        yield row


def one_step(make: Callable, device: str, settings: Settings) -> tuple[list[float], int | None]:
    """(times of each round, peak memory); the model is gone afterwards."""
    call = make()
    times = interleave(Clock(device), {"step": call}, settings)["step"]
    return times, peak_bytes(call, device)


def line(v: Verdict) -> str:
    """One target for people."""
    rates = f"{v.teraflops or 0:7.1f} TFLOP/s {v.bandwidth or 0:5.0%} of the copy rate"
    peers = ", ".join(f"{name} {times:.2f}" for name, times in v.times_faster.items())
    what, end = f"{v.op} {v.half} {v.label}", "; ".join(v.missed) or "reached"
    return f"{what:60} {v.runs_on:14} {rates}  times as fast as: {peers}  " + end


def save(path: Path, about: dict, passed: bool, verdicts: list[Verdict], steps: list[dict]) -> None:
    """JSON for programs, text for people."""
    results = {
        "machine": about,
        "tests_passed": passed,
        "targets": [asdict(v) for v in verdicts],
        "steps": steps,
    }
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    absent = sorted({f"{v.op}: {n} {why}" for v in verdicts for n, why in v.absent.items()})
    text = [f"{k}: {v}" for k, v in about.items()] + [
        "",
        *map(line, verdicts),
        "",
        *map(str, steps),
        "",
        *absent,
    ]
    path.with_suffix(".txt").write_text("\n".join(text) + "\n")
    reached = sum(not v.missed for v in verdicts)
    print(f"{reached} of {len(verdicts)} targets reached; saved {path.with_suffix('.json')}", flush=True)


def show() -> int:
    for goal in goals():
        wants = {k: v for k, v in goal._asdict().items() if v and k not in ("op", "half", "label", "sample")}
        print(f"{goal.op} {goal.half} {goal.label}: {wants}")
    for model in gpu_steps.models():
        print(f"step {model.name}: {model.against}")
    for name, module in gpu_peers.LIBRARIES.items():
        print(f"{name}: {'here' if gpu_peers.importable(module) else 'not installed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
