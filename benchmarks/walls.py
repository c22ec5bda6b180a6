"""python -m benchmarks.walls: the figures of docs/four-walls.md.

One a wall, all from `llmkern.plan`; with --measured, where the time went of steps that `llmkern diagnose`
ran with --json.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system is touched

import llmkern
from llmkern.diagnose import words
from llmkern.plan import RECIPES, Strategy, config, energy, hardware, memory, simulate, work
from llmkern.plan.hardware import GIB
from llmkern.plan.inference import decode_work

COLORS = ("#1f2937", "#c2410c", "#0f766e", "#7c3aed", "#b45309", "#9ca3af", "#2563eb")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all figures into a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walls", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figures")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", help="draw these alone")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measured:
        print("saved", measured(args.out, args.measured))
        return 0
    for draw in (compute, memory_parts, communication, energy_of_a_run):
        print("saved", draw(args.out))
    return 0


def compute(folder: Path) -> Path:
    """A roofline: products of training and of decoding, on an H100."""
    device = hardware.find("h100")
    rates, peak = work.rates(device), device.peak()
    figure, axes = _axes()
    intensity = sorted([device.ridge(), *(2.0**i for i in range(-1, 13))])
    axes.plot(intensity, [min(peak, x * device.bandwidth) / 1e12 for x in intensity], color=COLORS[5])
    axes.axvline(device.ridge(), color=COLORS[5], linestyle=":")
    axes.annotate(f"ridge: {device.ridge():.0f} FLOP a byte", (device.ridge() * 1.1, 1.3), color="#6b7280")
    llama = config.find("llama-3.1-8b")
    groups = {"training, 8,192 tokens": list(work.forward(llama, Strategy(), 8192))}
    for sequences in (1, 16, 256):
        s = Strategy(micro_batch=sequences)
        groups[f"decoding, {sequences} sequence{'s' * (sequences > 1)}"] = list(decode_work(llama, s, 2048))
    for (label, works), color, mark in zip(groups.items(), COLORS, "os^D"):
        products = [w for w in works if w.flops]
        xs = [w.flops / w.bytes for w in products]
        ys = [w.flops / rates.seconds(w) / 1e12 for w in products]
        axes.plot(xs, ys, mark, color=color, label=label, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of memory traffic", ylabel="TFLOP/s reached")
    axes.set_title("Llama 3.1 8B on an H100: the ops of one layer", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "wall-compute.png")


def memory_parts(folder: Path) -> Path:
    """What a device holds, as one measure after another is taken."""
    model, device = config.find("llama-3.1-8b"), hardware.find("h100")
    base = {"dp": 8, "micro_batch": 1}
    steps = {
        "DDP, no flash": Strategy(**base, flash=False),
        "+ flash attention": Strategy(**base),
        "+ ZeRO-1": Strategy(**base, zero=1),
        "+ FSDP": Strategy(**base, zero=3),
        "+ fused loss": Strategy(**base, zero=3, loss="linear"),
        "+ fused FFN": Strategy(**base, zero=3, loss="linear", fused_ffn=True),
        "+ recomputation": Strategy(**base, zero=3, loss="linear", recompute="full"),
    }
    figure, axes = _axes()
    found = {name: memory.training(model, s, RECIPES["mixed"], 8, 8192).parts for name, s in steps.items()}
    parts = list(dict.fromkeys(part for sizes in found.values() for part in sizes))
    left = dict.fromkeys(found, 0.0)
    for part, color in zip(parts, COLORS):
        sizes = [found[name].get(part, 0) / GIB for name in found]
        axes.barh(list(found), sizes, left=list(left.values()), color=color, label=part)
        left = {name: left[name] + size for name, size in zip(found, sizes)}
    axes.axvline(device.memory / GIB, color="#dc2626", linestyle="--", label="an H100 has")
    axes.invert_yaxis()
    axes.set(xlabel="GiB a device")
    axes.set_title("Llama 3.1 8B, 8,192 tokens a device, 8 H100", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _save(figure, folder / "wall-memory.png")


def communication(folder: Path) -> Path:
    """Where the seconds of a step go as devices are added, the batch unchanged, on two networks."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    a100 = hardware.find("a100")
    slow = dataclasses.replace(a100, network=1.25e9)
    names = ("25 GB/s a device (InfiniBand)", "1.25 GB/s (10 Gb Ethernet)")
    for axes, device, name in zip(figure.subplots(1, 2, sharey=True), (a100, slow), names):
        _shares(axes, device)
        axes.set(xlabel="A100")
        axes.set_title(name, loc="left", fontsize=10)
    figure.axes[0].set(ylabel="% of a step", ylim=(0, 100))
    figure.axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("GPT-3 175B, 2,048 sequences a step: what the fastest plan waits for", fontsize=10)
    simulate.plot(folder / "scaling.png", simulate.scaling("gpt3-175b", "a100"), "GPT-3 175B on A100")
    return _save(figure, folder / "wall-communication.png")


def _shares(axes: Axes, device: hardware.Hardware) -> None:
    """Bars of the walls' parts of a step, by number of devices."""
    plans = {2**i: llmkern.plan("gpt3-175b", device, 2**i, batch=2048).best.time for i in range(6, 12)}
    labels, bottom = [f"{n:,}" for n in plans], [0.0] * len(plans)
    for wall, color in zip(("compute", "memory", "communication", "bubble"), COLORS):
        values = [100 * time.walls[wall] / time.total for time in plans.values()]
        axes.bar(labels, values, bottom=bottom, color=color, label=wall)
        bottom = [b + v for b, v in zip(bottom, values)]
    _plain(axes)


def energy_of_a_run(folder: Path) -> Path:
    """Energy and CO2e of one training run by hardware and by grid."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("v100", "a100", "h100", "b200")
    runs = [llmkern.plan("gpt3-175b", name, 1024, tokens=3e11, dtype="float16").run.energy for name in names]
    middle = [run.kwh / 1000 for run in runs]
    spread = [[(r.kwh - r.low) / 1000 for r in runs], [(r.high - r.kwh) / 1000 for r in runs]]
    left.bar(
        [name.upper() for name in names], middle, yerr=spread, color=COLORS[1], ecolor=COLORS[5], capsize=4
    )
    left.set(ylabel="MWh, PUE 1.1")
    grids = ("norway", "france", "usa", "world", "china", "poland")
    grams = [energy.GRIDS[grid] for grid in grids]
    right.bar(grids, [runs[2].kwh * g / 1e6 for g in grams], color=COLORS[2])
    right.set(ylabel="t CO2e, on H100")
    right.tick_params(axis="x", labelsize=8)
    for axes in (left, right):
        _plain(axes)
    figure.suptitle("GPT-3 175B, 300 B tokens, 1,024 devices", fontsize=10)
    return _save(figure, folder / "wall-energy.png")


def measured(folder: Path, files: Sequence[Path]) -> Path:
    """Walls of steps that were run, and of the same swapped where they were."""
    steps = {}
    for found in (json.loads(file.read_text()) for file in files):
        about = f"{found['name']}, {found['mode']}, {found['tokens']:,} token{'s' * (found['tokens'] > 1)}"
        steps[about] = found
        if found["after"]:
            steps[f"{about}, swapped"] = found["after"]
    figure = Figure(figsize=(8, 1.2 + 0.38 * len(steps)), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    left = dict.fromkeys(steps, 0.0)
    for wall, color in zip(("compute", "memory", "launch", "data"), COLORS):
        shares = [100 * found["walls"][wall] / sum(found["walls"].values()) for found in steps.values()]
        axes.barh(list(steps), shares, left=list(left.values()), color=color, label=wall)
        left = {name: left[name] + share for name, share in zip(steps, shares)}
    axes.invert_yaxis()
    axes.set(xlabel="% of a step", xlim=(0, 100))
    figure.suptitle(words.machine(next(iter(steps.values()))["machine"]), fontsize=10)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return _save(figure, folder / "wall-measured.png")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    sys.exit(main())
