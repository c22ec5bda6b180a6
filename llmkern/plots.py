"""Pictures of trainings.  Needs matplotlib: `pip install llmkern[plot]`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure  # not pyplot: no window system is touched

from .train import Record

Curves = dict[str, Sequence[Record]]
STYLES = ({"color": "#b9b9b9", "linewidth": 4}, {"color": "#c2410c", "linewidth": 1.4})


def loss_and_throughput(path: Path, curves: Curves, title: str) -> None:
    """Save a PNG: the losses of the runs over each other, and their tokens per second.

    Args:
        path: where to.
        curves: label -> the records of a run; two runs.
        title: above both panels.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, speed = figure.subplots(1, 2)
    for (label, records), style in zip(curves.items(), STYLES):
        steps = [record.step for record in records]
        rates = [record.tokens / record.seconds for record in records]
        loss.plot(steps, [record.loss for record in records], label=label, **style)
        speed.plot(steps, rates, color=style["color"], label=f"{label}, median {median(rates):,.0f}")
    loss.set(xlabel="step", ylabel="loss (nats per token)")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    for axes in (loss, speed):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def losses(path: Path, log: Sequence[dict[str, Any]], title: str) -> None:
    """Save a PNG: the losses of a run's steps, faint, their running mean, and those on held-out text.

    Args:
        path: where to.
        log: the lines of log.jsonl.
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [(line["step"], line["loss"]) for line in log if line.get("loss") is not None]
    held_out = [(line["step"], line["val_loss"]) for line in log if line.get("val_loss") is not None]
    if steps:
        axes.plot(*zip(*steps), color="#d4d4d4", linewidth=0.8)
        window = max(1, len(steps) // 50)
        means = [(steps[i][0], mean(loss for _, loss in steps[i - window : i]))
                 for i in range(window, len(steps))]  # fmt: skip
        if means:
            axes.plot(*zip(*means), color="#525252", label=f"training, mean of {window} steps")
    if held_out:
        axes.plot(*zip(*held_out), color="#c2410c", marker="o", markersize=3, label="held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def confusion(path: Path, counts: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> None:
    """Save a PNG: a confusion matrix, shaded by the shares of each true class.

    Args:
        path: where to.
        counts: (K, K); row is the true class, column the predicted one.
        labels: names of the classes.
        title: above the picture.
    """
    size = max(4.0, 0.7 * len(labels) + 2)
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            dark = shares[i][j] > 0.6
            axes.text(j, i, f"{n:,}", ha="center", va="center", color="white" if dark else "black")
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, labels)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, dpi=130)
