"""python -m benchmarks.plan: the planner against the published record, every row."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from llmkern import machine
from llmkern.plan.record import predict, published, published_seconds

from .plan_rows import Group, groups
from .report import make_console


def main(argv: Sequence[str] | None = None) -> int:
    """Print every row and save them; 0 always: a missed target is a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--fit", action="store_true", help="the error of iteration times by the calibration")
    args = parser.parse_args(argv)
    console = make_console()
    if args.fit:
        console.print(fit())
        return 0
    found = list(groups())
    for group in found:
        console.print(table(group), group.about, "", soft_wrap=False)
    console.print(summary(found))
    today = date.today().isoformat()
    path = args.out / f"plan-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": today, "commit": machine.commit()}
    path.write_text(json.dumps({**about, "groups": [dataclasses.asdict(g) for g in found]}, indent=1) + "\n")
    text = path.with_suffix(".txt")
    with text.open("w") as file:
        plain = Console(file=file, width=170, highlight=False)
        plain.print(f"python -m benchmarks.plan, {today}, commit {about['commit']}", "")
        plain.print(summary(found), "")
        for group in found:
            plain.print(table(group), group.about, "")
    console.print(f"saved {path} and {text}")
    return 0


def table(group: Group) -> Table:
    """One group: name, published, ours, error, note, source."""
    result = Table(title=group.title, title_justify="left")
    result.add_column("", no_wrap=True)
    for name in (f"published ({group.unit})", "ours", "error"):
        result.add_column(name, justify="right")
    result.add_column("note", max_width=52)
    result.add_column("source", max_width=40)
    for row in group.rows:
        missed = "[red]" if row.name in group.missed else ""
        error = missed + _error(row.error, group)
        result.add_row(row.name, _figure(row.published), _figure(row.ours), error, row.note, row.source)
    return result


def summary(found: list[Group]) -> Table:
    """One line a group: rows, errors, targets."""
    result = Table(title="Summary", title_justify="left")
    for name in ("", "rows", "mean error", "largest", "target", "result"):
        result.add_column(name, justify="left" if not name or name == "result" else "right")
    for g in found:
        target = "-" if g.target is None else _error(g.target, g, sign="")
        if g.mean_target is not None:
            target += f", mean {_error(g.mean_target, g, sign='')}"
        verdict = {None: "", True: "met", False: f"missed in {len(g.missed)} of {len(g.rows)}"}[g.met]
        errors = _error(g.mean, g, sign=""), _error(g.largest, g, sign="")
        result.add_row(g.title, str(len(g.rows)), *errors, target, verdict)
    return result


def fit() -> Table:
    """Mean and largest error of the fitted rows by the one calibration."""
    result = Table(title="Iteration times, Megatron on A100", title_justify="left")
    for name in ("efficiency", "mean error", "largest"):
        result.add_column(name, justify="right")
    rows = published()["steps_fitted"]
    for hundredth in range(80, 96):
        value = hundredth / 100
        errors = [abs(predict(e, value).total / published_seconds(e) - 1) for e in rows]
        result.add_row(f"{value:.2f}", f"{mean(errors):.2%}", f"{max(errors):.2%}")
    return result


def _error(value: float, group: Group, sign: str = "+") -> str:
    if group.points:
        return f"{value:{sign}.2f} pt"
    return f"{value:{sign}.2%}" if abs(value) >= 1e-8 or not value else "0.00%"


def _figure(value: float) -> str:
    if value >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"


if __name__ == "__main__":
    sys.exit(main())
