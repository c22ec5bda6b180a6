"""python -m benchmarks.targets: what was reached of every speed target of the CPU kernels.

All of them in one run, or with --only some groups at a time, whose results join those of the same day
and commit in the result file.  verdicts.py says what is measured, and how.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llmkern import ceilings, machine

from . import report
from .measure import Clock
from .verdicts import FLOAT, GROUPS, HALF, ROOFED, Verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, whatever was reached: a busy machine must not fail a build."""
    args = parse(argv)
    console, start = report.make_console(), time.monotonic()
    about, clock = machine.describe("cpu"), Clock("cpu")
    path = args.out / f"targets-{machine.slug(about['device'])}-{about['date']}.json"
    found = ceilings.Ceilings()
    verdicts = [] if args.only == list(GROUPS) else earlier(path, about, args.only)
    for group in args.only:
        torch.manual_seed(0)
        if group in ROOFED:
            # again for each, the best so far: what else the machine does lowers a rate, nothing raises it
            found = found.best(ceilings.measure("cpu", [FLOAT, HALF], 0.05))
        for verdict in GROUPS[group](group, clock, found):
            verdicts.append(verdict)
            minutes = (time.monotonic() - start) / 60
            line = f"{verdict.what} {verdict.dtype} {verdict.half}: {reached(verdict)}"
            console.print(f"{minutes:4.1f} min  {group}: {line}")
            save(path, about, found, verdicts)  # a stopped run leaves what it had
    verdicts.sort(key=lambda v: list(GROUPS).index(v.group))
    save(path, about, found, verdicts)
    show(console, verdicts, found)
    if importlib.util.find_spec("matplotlib"):
        from . import plot

        plot.targets(path.with_suffix(".png"), verdicts, about)
    console.print(f"saved {path} after {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    return parser.parse_args(argv)


def earlier(path: Path, about: dict, but: list[str]) -> list[Verdict]:
    """Verdicts of the groups that are not measured now, where the file is of this machine and commit."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    if data["machine"] != about:
        return []
    rows = [{k: v for k, v in row.items() if k not in ("reached", "ok")} for row in data["targets"]]
    return [Verdict(**row) for row in rows if row["group"] not in but]


def save(path: Path, about: dict, found: ceilings.Ceilings, verdicts: list[Verdict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rates = {"flops": found.flops, "bandwidth": found.bandwidth}
    data = {"machine": about, "ceilings": rates, "targets": [asdict(v) for v in verdicts]}
    path.write_text(json.dumps(data, indent=1) + "\n")


def reached(v: Verdict) -> str:
    """ "1.20 x of 1.25, missed"."""
    ratio = "-" if v.reached is None else f"{v.reached:.2f} x"
    wanted = "" if v.target is None else f" of {v.target:.2f}"
    return f"{ratio}{wanted}, {'reached' if v.ok else 'missed'}"


def show(console: Console, verdicts: list[Verdict], found: ceilings.Ceilings) -> None:
    """One line for each target: our time, every peer's with the ratio, ceiling, memory, verdict."""
    table = Table(header_style="bold")
    for name in ("target", "dtype", "half"):
        table.add_column(name, no_wrap=True)
    for name in (
        "ms",
        "eager ms",
        "compile ms",
        "other ms",
        "ratio",
        "wanted",
        "ceiling",
        "wanted",
        "memory",
        "wanted",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for v in verdicts:
        others = [
            f"{1e3 * t:.2f} {peer}" for peer, (t, _) in v.peers.items() if peer not in ("eager", "compile")
        ]
        peers = [f"{1e3 * v.peers[p][0]:.2f}" if p in v.peers else "-" for p in ("eager", "compile")]
        fractions = (v.ceiling, v.ceiling_target, v.memory, v.memory_target)
        table.add_row(
            f"{v.group}: {v.what}" if not v.what.startswith(v.group) else v.what, v.dtype, v.half,
            f"{1e3 * v.seconds:.2f}", *peers, ", ".join(others) or "-",
            *("-" if x is None else f"{x:.2f}" for x in (v.reached, v.target)),
            *("-" if x is None else f"{x:.0%}" for x in fractions),
            "[green]reached[/]" if v.ok else "[red]missed[/]",
        )  # fmt: skip
    console.print(table)
    console.print(f"{sum(v.ok for v in verdicts)} of {len(verdicts)} targets reached; ceilings: {found}")


if __name__ == "__main__":
    sys.exit(main())
