"""A picture of the results: ratios and fractions of the ceiling, a bar for each case."""

from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window system is touched

from .report import best_peer, by_case
from .suite import Row

FASTER, SLOWER, CEILING = "#15803d", "#b91c1c", "#1d4ed8"


def bars(path: Path, rows: list[Row], machine: dict) -> None:
    """Save a PNG with the ratio of llmkern to the fastest other, and its fraction of the ceiling."""
    shown = [case for case in by_case(rows) if "llmkern" in case and best_peer(case)]
    labels = [f"{r.op} {r.sample} {r.dtype} {r.half}" for r in (case["llmkern"] for case in shown)]
    best = [best_peer(case) for case in shown]
    fractions = [case["llmkern"].ceiling for case in shown]
    figure = Figure(figsize=(13, 1.5 + 0.24 * len(shown)), layout="constrained")
    ratio, ceiling = figure.subplots(1, 2, sharey=True)
    colors = [FASTER if row.speedup >= 1 else SLOWER for row in best]
    drawn = ratio.barh(labels, [row.speedup for row in best], color=colors)
    ratio.bar_label(drawn, [f"{row.speedup:.2f} × {row.peer}" for row in best], padding=3, fontsize=7)
    ratio.axvline(1, color="black", linewidth=0.8)
    ratio.set(
        xlabel="times faster than the fastest other", xlim=(0, 1.25 * max(1, *(r.speedup for r in best), 1))
    )
    drawn = ceiling.barh(labels, fractions, color=CEILING)
    ceiling.bar_label(drawn, [f"{f:.0%}" for f in fractions], padding=3, fontsize=7)
    ceiling.axvline(1, color="black", linewidth=0.8)
    ceiling.set(
        xlabel="fraction of the ceiling measured in the same run", xlim=(0, 1.1 * max(1, *fractions, 1))
    )
    ratio.invert_yaxis()
    ratio.tick_params(axis="y", labelsize=7)
    for axes in (ratio, ceiling):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{machine['device']}, {machine['threads']} threads, {machine['date']}")
    figure.savefig(path, dpi=130)


def targets(path: Path, verdicts: list, machine: dict) -> None:
    """Save a PNG with what was reached of each target of `benchmarks.targets`: ratios and ceilings."""
    labels = [f"{v.group} {v.what.removeprefix(v.group)} {v.dtype} {v.half}" for v in verdicts]
    colors = [FASTER if v.ok else SLOWER for v in verdicts]
    figure = Figure(figsize=(13, 1.5 + 0.24 * len(labels)), layout="constrained")
    ratio, ceiling = figure.subplots(1, 2, sharey=True)
    _against(ratio, [v.reached for v in verdicts], [v.target for v in verdicts], colors, "{:.2f}")
    _against(ceiling, [v.ceiling for v in verdicts], [v.ceiling_target for v in verdicts], CEILING, "{:.0%}")
    ratio.axvline(1, color="black", linewidth=0.8)
    ratio.set(xlabel="times faster than the fastest peer")
    ceiling.set(xlabel="fraction of the ceiling measured in the same run")
    ratio.set_yticks(range(len(labels)), labels, fontsize=7)
    ratio.invert_yaxis()
    for axes in (ratio, ceiling):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{machine['device']}, {machine['threads']} threads, {machine['date']}")
    figure.savefig(path, dpi=130)


def _against(axes, reached: list, wanted: list, colors, style: str) -> None:
    """Bars of what was reached, a mark for what was wanted; None is neither."""
    places = range(len(reached))
    drawn = axes.barh(places, [r or 0 for r in reached], color=colors)
    labels = [
        "" if r is None else style.format(r) + ("" if w is None else f" of {style.format(w)}")
        for r, w in zip(reached, wanted)
    ]
    axes.bar_label(drawn, labels, padding=3, fontsize=7)
    marks = [(w, place) for w, place in zip(wanted, places) if w is not None]
    axes.plot(*zip(*marks), "|", color="black", markersize=9)
    axes.set_xlim(0, 1.25 * max(1, *(x for x in (*reached, *wanted) if x is not None)))


def trainings(path: Path, trainers: dict, recipe: str, machine: dict) -> None:
    """Save a PNG with the losses of `benchmarks.pretrain`, by step and by seconds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for (name, found), color, width in zip(trainers.items(), ("#b9b9b9", SLOWER, CEILING), (5, 2.4, 1)):
        losses = found["loss"]
        by_step.plot(losses, color=color, linewidth=width, alpha=0.6)
        steps, seconds, held_out = zip(*found["validations"])
        label = f"{name}, held-out text"
        by_step.plot(steps, held_out, "o-", color=color, linewidth=width, label=label)
        by_time.plot(seconds, held_out, "o-", color=color, label=f"{name}, {found['seconds']:.0f} s in all")
    by_step.set(xlabel="step", ylabel="loss (nats per token)")
    by_time.set(xlabel="seconds of this trainer's own steps")
    for axes in (by_step, by_time):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{recipe}, {machine['device']}, {machine['threads']} threads, {machine['date']}")
    figure.savefig(path, dpi=130)
