"""Step time from 1 to 16,384 devices, beside what was published at scale."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import config
from .api import default_batch, plan
from .record import PAPERS
from .record import points as published_runs

MOST = 16384


@dataclass(frozen=True)
class Point:
    """A number of devices, the best strategy there, and what it reaches; mfu counts attention whole."""

    devices: int
    strategy: str
    batch: int
    seconds: float
    tokens_per_second: float
    mfu: float
    wall: str


def scaling(
    model: Any, on: str, batch: int | None = None, seq: int | None = None, **settings: Any
) -> list[Point]:
    """The best strategy at 1, 2, 4 ... 16,384 devices; those are left out on which the model does not fit.

    The batch stays, until there are more devices than it has sequences; then it grows with them.

    Raises:
        UserError: as `plan`, when nothing fits anywhere.
    """
    shape = config.find(model)
    seq = seq or min(shape.context, 8192)
    batch = batch or default_batch(shape, seq, 1)
    points, error = [], None
    for power in range(MOST.bit_length()):
        devices = 2**power
        try:
            found = plan(shape, on, devices, batch=max(batch, devices), seq=seq, **settings)
        except UserError as reason:
            error = reason
            continue
        best = found.best
        rate, part = found.tokens_per_second(best), found.mfu(best)["full"]
        total = best.time.total
        points.append(Point(devices, str(best.strategy), found.job.batch, total, rate, part, best.time.wall))
    if not points:
        raise error
    return points


def plot(path: Path, points: list[Point], on: str) -> Path:
    """Save a PNG of MFU and step time by devices, with the published runs and what is planned of each.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window system is touched
    except ImportError as error:
        raise UserError("--simulate draws with matplotlib; `pip install llmkern[plot]`, or --json") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    devices, old, ours = [p.devices for p in points], "#374151", "#c2410c"
    left.plot(devices, [100 * p.mfu for p in points], "o-", color=ours, label=f"planned, {on}")
    right.plot(devices, [p.seconds for p in points], "o-", color=ours)
    for paper, mark in zip(PAPERS.values(), "s^D"):
        runs = [run for run in published_runs() if run.paper == paper]
        xs = [run.devices for run in runs]
        left.plot(xs, [100 * r.published for r in runs], mark, color=old, mfc="none", label=paper)
        left.plot(xs, [100 * r.planned for r in runs], mark, color=ours, markersize=3)
        right.plot(xs, [r.published_seconds for r in runs], mark, color=old, mfc="none")
        right.plot(xs, [r.planned_seconds for r in runs], mark, color=ours, markersize=3)
    left.plot([], [], "o", color=ours, markersize=3, label="planned of the same runs")
    left.set(xscale="log", xlabel="devices", ylabel="MFU (%), attention counted whole", ylim=(0, None))
    right.set(
        xscale="log", yscale="log", xlabel="devices", ylabel="seconds of a step, each run its own model"
    )
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path
