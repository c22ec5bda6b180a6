"""What the demo shows: progress while it trains, then one table.  Plain lines where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .compare import Comparison
from .train import Record
from .train.live import LINES, Pace

WIDTH = 100  # of the table where there is no terminal
Update = Callable[[Record, Record], None]


def make_console() -> Console:
    """A console that keeps its width and its plain text in pipes and logs."""
    plain = {"highlight": False, "markup": False, "emoji": False}  # brackets and colons are only text
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=WIDTH)


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Update]:
    """Inside the block, call the given function with the two records of every step."""
    paces = Pace(), Pace()

    def describe(plain: Record, swapped: Record) -> str:
        speeds = paces[0](plain), paces[1](swapped)
        return (
            f"plain {plain.loss:.4f} at {speeds[0]:,.0f} tokens/s, "
            f"swapped {swapped.loss:.4f} at {speeds[1]:,.0f}"
        )

    if not console.is_terminal:
        yield _print_lines(console, steps, describe)
        return
    columns = (MofNCompleteColumn(), BarColumn(8), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps)
        yield lambda plain, swapped: bar.update(task, advance=1, description=describe(plain, swapped))


@contextmanager
def counting(console: Console, unit: str) -> Iterator[Callable[[str, int], None]]:
    """Inside the block, call the given function with what is being done and how many are."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done: bar.update(task, description=f"{stage}: {done:,} {unit}")


def _print_lines(console: Console, steps: int, describe: Callable[[Record, Record], str]) -> Update:
    spent = 0.0
    every = max(1, steps // LINES)

    def update(plain: Record, swapped: Record) -> None:
        nonlocal spent
        spent += plain.seconds + swapped.seconds
        line, done = describe(plain, swapped), plain.step + 1
        if done % every == 0 or done == steps:
            left = spent / done * (steps - done)
            console.print(f"step {done:>4}/{steps}, {left:.0f} s left: loss {line}", soft_wrap=True)

    return update


def show_comparison(console: Console, comparison: Comparison, agree_steps: int) -> None:
    """The table at the end: losses, speed, time by kind of op, memory, kernels."""
    plain, swapped = comparison.plain, comparison.swapped
    table = Table(title="One GPT, trained twice", title_justify="left")
    for name in ("", "plain PyTorch", "llmkern", "gain"):
        table.add_column(name, justify="right" if name else "left")
    losses = (
        ("loss of the last step", plain.records[-1].loss, swapped.records[-1].loss),
        ("loss on held-out text", plain.validation_loss, swapped.validation_loss),
    )
    for name, *both in losses:
        table.add_row(name, *(f"{loss:.4f}" for loss in both))
    steps = min(agree_steps, len(plain.records))
    table.add_row(
        f"  apart in the first {steps} steps", "", f"at most {comparison.largest_difference(steps):.1e}"
    )
    table.add_row(
        "  apart in all steps", "", f"at most {comparison.largest_difference():.1e}", end_section=True
    )
    speeds = plain.tokens_per_second, swapped.tokens_per_second
    table.add_row("tokens/s", *(f"{speed:,.0f}" for speed in speeds), f"{comparison.speedup():.2f} x")
    _add_gain(table, "step, median (ms)", plain.step_seconds * 1e3, swapped.step_seconds * 1e3)
    for kind, seconds in plain.seconds_by_kind.items():
        _add_gain(table, f"  {kind} (ms)", seconds * 1e3, swapped.seconds_by_kind[kind] * 1e3)
    mebibytes = plain.peak_bytes / 2**20, swapped.peak_bytes / 2**20
    _add_gain(table, "peak memory of a step (MiB)", *mebibytes)
    table.add_section()
    for op, backends in comparison.backends_by_op().items():
        table.add_row(f"{op} runs on", "PyTorch", backends)
    console.print(table)


def _add_gain(table: Table, name: str, plain: float, swapped: float) -> None:
    table.add_row(name, f"{plain:.1f}", f"{swapped:.1f}", f"{plain / swapped:.2f} x" if swapped else "")
