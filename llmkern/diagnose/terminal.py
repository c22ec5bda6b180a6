"""A diagnosis in the terminal."""

import io

from rich import box
from rich.console import Console, Group
from rich.table import Table

from . import words
from .memory import PARTS
from .report import CONVENTION, WALLS, Diagnosis
from .units import duration, percent, size

ROWS = 18  # ops shown; JSON and the page have all
WIDTH = 118


def render(found: Diagnosis) -> Group:
    """Everything, top down."""
    title = (
        f"{found.name}, {found.parameters:,} parameters, {found.mode} step of {found.tokens:,} tokens "
        f"in {found.dtype}"
    )
    parts = [
        title,
        words.machine(found.profile.about),
        f"ceilings: {words.ceilings(found)}",
        "",
        words.headline(found),
        "",
    ]
    parts += [_facts(found), "", _walls(found), _ops(found), _memory(found)]
    parts += [_remedies(found), _outcomes(found)] if found.remedies else [_outcomes(found)]
    if found.after is not None:
        parts += [found.swap, "", _ops(found.after)]
    parts += [*(f"note: {note}" for note in found.notes), f"note: {CONVENTION}"]
    return Group(*parts)


def as_text(found: Diagnosis) -> str:
    """The same as text."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, emoji=False)
    console.print(render(found))
    return console.file.getvalue().rstrip()


def _table(title: str, left: int, *columns: str) -> Table:
    """The first `left` columns are words, the others figures."""
    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=title, title_justify="left", **look)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i >= left)
    return table


def _facts(found: Diagnosis) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in words.facts(found).items():
        grid.add_row(name, value)
    return grid


def _walls(found: Diagnosis) -> Table:
    table = _table("Walls", 1, "wall", "time", "of the step", "")
    total = sum(found.walls.values())
    for wall in WALLS:
        part = found.walls[wall] / total
        table.add_row(wall, duration(found.walls[wall]), percent(part), "█" * round(30 * part))
    table.columns[3].justify = "left"
    return table


def _ops(found: Diagnosis) -> Table:
    names = ("time", "%", "FLOPs", "bytes", "FLOP/B", "ceiling")
    table = _table("Ops, longest first", 4, "module", "op", "phase", "wall", "calls", *names)
    table.caption = "ceiling: the least time that this machine could take, as part of the time taken"
    table.caption_justify = "left"
    for row in found.rows[:ROWS]:
        table.add_row(
            _end(row.module or "(outside)", 22), _end(words.op(row), 16), row.phase, row.wall, str(row.calls),
            duration(row.seconds), f"{100 * found.share(row.seconds):.1f}", words.work(row), size(row.bytes),
            words.intensity(row), words.ceiling(row),
        )  # fmt: skip
    rest = found.rows[ROWS:]
    if rest:
        seconds = sum(row.seconds for row in rest)
        share = f"{100 * found.share(seconds):.1f}"
        table.add_row(
            f"{len(rest)} more", "", "", "", str(sum(r.calls for r in rest)), duration(seconds), share
        )
    return table


def _end(path: str, width: int) -> str:
    """The last `width` letters of a path, which say most."""
    return path if len(path) <= width else "…" + path[1 - width :]


def _memory(found: Diagnosis) -> Table:
    table = _table("Memory at the peak", 1, "part", "measured", "predicted")
    for part in PARTS:
        values = found.parts[part], found.prediction.parts[part]
        if any(values):
            table.add_row(part, *map(size, values))
    table.add_section()
    table.add_row("all", size(sum(found.parts.values())), size(found.prediction.peak_bytes))
    return table


def _remedies(found: Diagnosis) -> Table:
    table = _table("What would change it, predicted", 2, "change", "why", "tokens/s", "step", "peak memory")
    for r in found.remedies:
        table.add_row(r.name, r.reason, f"{r.speedup:.2f} x", duration(r.seconds), size(r.peak_bytes))
    return table


def _outcomes(found: Diagnosis) -> Table:
    table = _table("Predicted before it ran, and measured", 1, "", "predicted", "measured", "off by")
    for row in words.outcomes(found):
        table.add_row(*row)
    return table
