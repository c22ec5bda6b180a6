"""Pictures of the demo.  Needs matplotlib: `pip install llmkern[plot]`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

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
