"""Step time from 1 to 16,384 devices, beside what was published at scale."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import config, hardware
from .api import default_batch, plan
from .flops import flops
from .strategy import Strategy

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


@cache
def published() -> dict[str, Any]:
    """The published record: runs, parameters, memory, energy, each with its source."""
    return json.loads(Path(__file__).with_name("published.json").read_text())


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


def published_points() -> list[tuple[str, int, float]]:
    """(paper, devices, MFU with attention whole) of the published Megatron and Llama 3 runs."""
    result = []
    for run in [*published()["steps_fitted"], *published()["steps_other"]]:
        paper = run["run"].split(" ")[0]
        if paper not in ("Megatron", "Megatron-Core", "Llama") or "PTD-P" in run["run"]:
            continue
        strategy, device = Strategy(**run["strategy"]), hardware.find(run["device"])
        rate = run["published"] * 1e12
        if run["unit"].startswith("hardware"):
            work = flops(config.find(run["model"]), run["seq"])
            rate *= work.training() / work.hardware(strategy.recompute)
        names = {"Megatron": "Megatron 2021, A100", "Megatron-Core": "Megatron-Core 2024, H100"}
        result.append((names.get(paper, "Llama 3 405B, H100"), strategy.devices, rate / device.peak()))
    return result


def plot(path: Path, points: list[Point], on: str) -> Path:
    """Save a PNG of MFU and step time by devices, with the published points.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window system is touched
    except ImportError as error:
        raise UserError("--simulate draws with matplotlib; `pip install llmkern[plot]`, or --json") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    devices = [p.devices for p in points]
    left.plot(devices, [100 * p.mfu for p in points], "o-", color="#c2410c", label=f"planned, {on}")
    marks = iter("s^D")
    for name in dict.fromkeys(name for name, *_ in published_points()):
        xs, ys = zip(*((n, 100 * part) for label, n, part in published_points() if label == name))
        left.plot(xs, ys, next(marks), color="#6b7280", mfc="none", label=f"published, {name}")
    left.set(xscale="log", xlabel="devices", ylabel="MFU (%), attention counted whole", ylim=(0, None))
    right.plot(devices, [p.seconds for p in points], "o-", color="#c2410c")
    right.set(xscale="log", yscale="log", xlabel="devices", ylabel="seconds of a step")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path
