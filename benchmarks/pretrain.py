"""Time to the same loss: `llmkern train` against a trainer as nanoGPT writes it, in turns of some steps.

    python -m benchmarks.pretrain                                         # nanoGPT's recipe for a CPU
    python -m benchmarks.pretrain --recipe shakespeare-char --steps 150   # its 6 layers x 384

All have the same data, the same windows, the same initial weights and the same settings, and each its own
loop, with validations, log and checkpoints.  The trainer like nanoGPT's computes in float32, as nanoGPT
does on a CPU; `llmkern train` runs once in float32 and once under bfloat16 autocast.  The large recipe
differs from nanoGPT's in the batch, 8 instead of 64 windows, for the time it takes, and in dropout, 0
instead of 0.2, since two libraries that draw different numbers cannot be compared step by step.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.table import Table

from llmkern import machine
from llmkern.display import make_console
from llmkern.models import GPT
from llmkern.text.batches import Batches
from llmkern.text.prepare import Options, prepare
from llmkern.text.sources import Sources
from llmkern.train import RunConfig
from llmkern.train.log import read_log
from llmkern.train.run import Run
from llmkern.train.tensors import fill_module, module_tensors

from .nanogpt import NanoGPT

COMMON = {  # nanoGPT, config/train_shakespeare_char.py
    "order": "random", "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 100,
    "betas": (0.9, 0.99), "weight_decay": 0.1, "grad_clip": 1.0, "bias": False, "dropout": 0.0, "plot": False,
}  # fmt: skip
RECIPES = {  # nanoGPT, README: "I only have a macbook", and the one for a GPU
    "nano": {"steps": 2000, "batch_size": 12, "eval_every": 250, "save_every": 250, "eval_batches": 20},
    "shakespeare-char": {"steps": 150, "batch_size": 8, "eval_every": 50, "save_every": 0, "eval_batches": 5},
}  # fmt: skip
PEER, DTYPES = "nanoGPT-like", ("float32", "bfloat16")
TURN = 10  # steps, so that each finds its own data in the caches
Seconds = dict[str, list[tuple[float, float]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="nano")
    parser.add_argument("--steps", type=int, help="by default those of the recipe, 2000 or 150")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of ours alone; by default both")
    parser.add_argument("--data", default="shakespeare", help="a source of `llmkern data prepare`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    settings = {**COMMON, **RECIPES[args.recipe], "preset": args.recipe}
    settings |= {"steps": args.steps} if args.steps else {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Sources([args.data]), Path(folder) / "data", Options())
        found = compare(Path(folder), settings, args.dtype or DTYPES)
    show(found)
    save(found, args.out, args.recipe)
    return 0


def compare(folder: Path, settings: dict, dtypes: Sequence[str]) -> dict:
    """Train all on the tokens in folder/data; returns losses and seconds of each."""
    runs = {f"llmkern {dtype}": Run(RunConfig(
        data=str(folder / "data"), out=str(folder / dtype), dtype=dtype, **settings)) for dtype in dtypes
    }  # fmt: skip
    try:
        models = [run.__enter__().model for run in runs.values()]
        first = next(iter(runs.values()))
        peer = _peer(first, models[0], folder)
        trainers = {PEER: peer.steps(), **{name: run.steps() for name, run in runs.items()}}
        seconds = take_turns(trainers)
    finally:
        for run in runs.values():
            run.__exit__(None, None, None)
    found = {PEER: _about(seconds[PEER], peer.losses, peer.validations)}
    for name, run in runs.items():
        losses = [line["loss"] for line in read_log(run.path) if "loss" in line]
        found[name] = _about(seconds[name], losses, run.validations)
    return {"machine": machine.describe("cpu"), "settings": settings, "trainers": found}


def _peer(run: Run, model: GPT, folder: Path) -> NanoGPT:
    """The trainer like nanoGPT's, of the same weights and windows."""
    plain = GPT(model.config, kernels=False)
    fill_module(plain, module_tensors(model), "the other model")
    size = run.config.batch_size, run.config.block_size, run.config.seed
    starts = {split: Batches(run.data.tokens(split), *size) for split in ("train", "val")}
    return NanoGPT(run.config, plain, folder / "data", starts, folder / "nanogpt")


def take_turns(trainers: dict[str, Iterator[int]]) -> Seconds:
    """Run all generators to their ends, TURN steps at a time.

    Returns:
        For each the seconds of the clock and of the processor of every step, the end as the last.
    """
    seconds: Seconds = {name: [] for name in trainers}
    running = dict(trainers)
    while running:
        for name, steps in list(running.items()):
            for _ in range(TURN):
                begin, cpu = time.perf_counter(), time.process_time()
                ended = next(steps, None) is None
                seconds[name].append((time.perf_counter() - begin, time.process_time() - cpu))
                if ended:
                    del running[name]
                    break
    return seconds


def _about(
    times: list[tuple[float, float]], losses: list[float], validations: list[tuple[int, float]]
) -> dict:
    """What is kept of a trainer; a validation is (step, seconds until it began, loss)."""
    seconds, processor = zip(*times)
    return {
        "seconds": sum(seconds),
        "processor_seconds": sum(processor),
        "step_seconds": median(seconds),
        "loss": [round(loss, 5) for loss in losses],
        "validations": [(step, sum(seconds[:step]), loss) for step, loss in validations],
        "second_of_step": [round(value, 4) for value in seconds],
    }


def show(found: dict) -> None:
    """All side by side, at every validation and at the end."""
    trainers = found["trainers"]
    table = Table("step", title="Time to the same loss", title_justify="left")
    for name in trainers:
        for column in (f"{name}: val loss", "s", *(["gain"] if name != PEER else [])):
            table.add_column(column, justify="right")
    for row in zip(*(t["validations"] for t in trainers.values())):
        cells = [str(row[0][0])]
        for i, (_, seconds, loss) in enumerate(row):
            gain = [f"{row[0][1] / seconds:.2f} x" if seconds else ""]
            cells += [f"{loss:.4f}", f"{seconds:.1f}", *(gain if i else [])]
        table.add_row(*cells)
    console = make_console()
    console.print(table)
    for line in verdicts(trainers):
        console.print(line, soft_wrap=True)


def verdicts(trainers: dict) -> Iterator[str]:
    """A sentence on each of ours against the peer."""
    peer = trainers[PEER]
    for name, ours in list(trainers.items())[1:]:
        apart = max(abs(a - b) for a, b in zip(peer["loss"], ours["loss"]))
        gains = {key: peer[key] / ours[key] for key in ("seconds", "processor_seconds", "step_seconds")}
        yield (
            f"{name}: {ours['seconds']:.1f} s against {peer['seconds']:.1f} s, {gains['seconds']:.2f} x; "
            f"{gains['processor_seconds']:.2f} x of processor time; median step "
            f"{ours['step_seconds'] * 1e3:.1f} ms against {peer['step_seconds'] * 1e3:.1f} ms, "
            f"{gains['step_seconds']:.2f} x; losses of all steps apart by at most {apart:.1e}"
        )


def save(found: dict, out: Path, recipe: str) -> None:
    """The figures as JSON, and the curves as PNG where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    about = found["machine"]
    path = out / f"pretrain-{recipe}-{machine.slug(about['device'])}-{about['date']}.json"
    path.write_text(json.dumps(found) + "\n")
    print(f"saved {path}")
    try:
        from .plot import trainings
    except ImportError:
        print("no picture: matplotlib is missing; `pip install llmkern[plot]`")
    else:
        trainings(path.with_suffix(".png"), found["trainers"], recipe, about)


if __name__ == "__main__":
    sys.exit(main())
