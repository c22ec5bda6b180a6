"""The published record of runs, and what the planner says of the same runs."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from . import config, hardware, step
from .flops import flops
from .step import StepTime
from .strategy import RECIPES, Strategy

PAPERS = {
    "Megatron": "Megatron 2021, A100",
    "Megatron-Core": "Megatron-Core 2024, H100",
    "Llama": "Llama 3 405B, H100",
}


@cache
def published() -> dict[str, Any]:
    """Runs, parameters, memory and energy as published, each with its source."""
    return json.loads(Path(__file__).with_name("published.json").read_text())


def predict(entry: dict[str, Any], efficiency: float = step.EFFICIENCY) -> StepTime:
    """The step time of a published run."""
    model, device = config.find(entry["model"]), hardware.find(entry["device"])
    strategy, recipe = Strategy(**entry["strategy"]), RECIPES[entry["recipe"]]
    return step.predict(model, device, strategy, recipe, entry["batch"], entry["seq"], efficiency=efficiency)


def published_seconds(entry: dict[str, Any]) -> float:
    """Seconds of an iteration of a published run, from the figure that its paper prints.

    "hardware TFLOP/s" of Megatron's papers is 96 B s L d² (1 + s/6d + V/16Ld) (arXiv:2104.04473, equation 3).
    """
    if entry["unit"] == "s":
        return entry["published"]
    tokens = entry["batch"] * entry["seq"]
    if entry["unit"] == "tokens/s":
        return tokens / entry["published"]
    work = flops(config.find(entry["model"]), entry["seq"])
    per_token = work.training() if entry["unit"].startswith("model") else work.hardware("full")
    return tokens * per_token / (entry["published"] * 1e12 * Strategy(**entry["strategy"]).devices)


class Point(NamedTuple):
    """One published run.

    Attributes:
        paper, devices: of it.
        published, planned: MFU, attention counted whole.
        published_seconds, planned_seconds: of a step.
    """

    paper: str
    devices: int
    published: float
    planned: float
    published_seconds: float
    planned_seconds: float


def points() -> list[Point]:
    """The published runs of Megatron and Llama 3 at scale."""
    result = []
    for entry in [*published()["steps_fitted"], *published()["steps_other"]]:
        paper = PAPERS.get(entry["run"].split(" ")[0])
        if paper is None or "PTD-P" in entry["run"]:
            continue
        devices = Strategy(**entry["strategy"]).devices
        work = flops(config.find(entry["model"]), entry["seq"]).training() * entry["batch"] * entry["seq"]
        best = work / devices / hardware.find(entry["device"]).peak()
        seconds, planned = published_seconds(entry), predict(entry).total
        result.append(Point(paper, devices, best / seconds, best / planned, seconds, planned))
    return result
