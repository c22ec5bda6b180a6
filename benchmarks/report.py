"""Results as a table in the terminal and as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from llmkern.ceilings import Ceilings

from .suite import Row

WIDTH = 170  # of the table where there is no terminal


def by_case(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of each case by peer; rows of one case follow each other."""
    groups = groupby(rows, lambda row: (row.op, row.sample, row.dtype, row.half))
    return [{row.peer: row for row in group} for _, group in groups]


def save(path: Path, machine: dict, ceilings: Ceilings, settings: dict, rows: list[Row], left_out: list[str]):
    """Write everything as JSON; a later call overwrites, so a stopped run leaves what it had."""
    data: dict[str, Any] = {
        "machine": machine,
        "ceilings": {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth},
        "settings": settings,
        "left_out": left_out,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def best_peer(case: dict[str, Row]) -> Row | None:
    """The fastest of the others; None where there are none."""
    others = [row for peer, row in case.items() if peer != "llmkern" and row.speedup is not None]
    return min(others, key=lambda row: row.speedup, default=None)


def table(rows: list[Row], peers: list[str]) -> Table:
    """One line for each case: our time, its part of the ceiling, the ratios to the peers, memory."""
    result = Table(header_style="bold")
    for name in ("op", "sample", "dtype", "half", "runs on"):
        result.add_column(name, no_wrap=name == "runs on")
    others = [peer for peer in peers if peer != "llmkern"]
    for name in ("ms", "± %", "rate", "ceiling", *(f"× {peer}" for peer in others), "MB", "eager MB"):
        result.add_column(name, justify="right", no_wrap=True)
    op = None
    for case in by_case(rows):
        row = case.get("llmkern") or next(iter(case.values()))
        if op not in (None, row.op):
            result.add_section()
        op = row.op
        ratios = (_ratio(case[peer]) for peer in others)
        memory = (_megabytes(case.get(peer)) for peer in ("llmkern", "eager"))
        result.add_row(row.op, row.sample, row.dtype, row.half, row.backend, *_numbers(row), *ratios, *memory)
    return result


def _numbers(row: Row) -> list[str]:
    if row.median_s is None:
        return ["[red]failed[/]", "", "", ""]
    rate = f"{row.gflops:,.0f} GFLOP/s" if row.limit == "compute" else f"{row.gbps:,.1f} GB/s"
    return [f"{1e3 * row.median_s:.3f}", f"{100 * row.iqr_s / row.median_s:.0f}", rate, f"{row.ceiling:.0%}"]


def _ratio(row: Row) -> str:
    if row.error:
        return "[red]failed[/]"
    if row.speedup is None:
        return "-"
    return f"[{'green' if row.speedup >= 1 else 'red'}]{row.speedup:.2f}[/]"


def _megabytes(row: Row | None) -> str:
    return "-" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}"


def notes(rows: list[Row], ceilings: Ceilings) -> list[str]:
    """What a reader must know besides the numbers: ceilings, slower cases, fallbacks, failures."""
    found = [f"ceilings: {ceilings}"]
    best = [row for case in by_case(rows) if (row := best_peer(case))]
    if best:
        average = exp(mean(log(row.speedup) for row in best))
        slower = sum(row.speedup < 1 for row in best)
        found.append(
            f"against the fastest other in each of {len(best)} cases: geometric mean {average:.2f} ×, "
            f"slower in {slower}"
        )
    above = sum(row.ceiling > 1.05 for row in rows if row.ceiling)
    if above:
        found.append(
            f"[yellow]{above} rows are above their ceiling[/]: the machine was busy while the ceilings "
            "were measured; run again when it is quiet"
        )
    for row in rows:
        where = f"{row.op} {row.sample} {row.dtype} {row.half}"
        if row.error:
            found.append(f"[red]{row.peer} failed on {where}[/]: {row.error}")
    reasons = {(row.op, reason) for row in rows for reason in row.reasons}
    found += [f"[yellow]{op} ran on the reference[/]: {reason}" for op, reason in sorted(reasons)]
    return found


def make_console() -> Console:
    """A console that keeps its width in pipes and logs."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def show(console: Console, rows: list[Row], peers: list[str], ceilings: Ceilings) -> None:
    """Print the table and the notes."""
    console.print(Group(table(rows, peers), *notes(rows, ceilings)))
