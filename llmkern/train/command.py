"""Pre-train a model on prepared data; the same command goes on where it was stopped or killed."""

import argparse
import dataclasses
import math

import torch
from rich.console import Console

from .. import ceilings, display
from ..errors import UserError
from ..models.build import describe
from .config import RunConfig
from .keys import read_file
from .live import Live, token_flops
from .log import read_log
from .run import Run, Stopped
from .team import speaks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML or YAML file with these keys")
    keys = parser.add_argument_group("keys", "each also as a line of the file; the command line wins")
    for f in dataclasses.fields(RunConfig):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        default = "" if f.default is None else f"; default {_shown(f.default)}"
        names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        about = f"{f.metadata['help']}{choices}{default}".replace("%", "%%")
        keys.add_argument(*names, dest=f.name, metavar="VALUE", help=about)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value) or "none"


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 128 + the number of the signal that stopped it."""
    console = display.make_console() if speaks() else Console(quiet=True)
    config = read_config(args)
    if not config.data:
        raise UserError("data is missing; give --data FOLDER, made by `llmkern data prepare`")
    with Run(config, lambda sentence: console.print(sentence, soft_wrap=True)) as run:
        console.print(_plan(run), soft_wrap=True)
        return _train(run, console)


def read_config(args: argparse.Namespace) -> RunConfig:
    """The file's keys, and over them the command line's."""
    values = read_file(args.config) if args.config else {}
    source = f"config {args.config!r}" if args.config else "the command line"
    RunConfig.make(values, source)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(RunConfig)}
    return RunConfig.make({**values, **{k: v for k, v in given.items() if v is not None}}, "the command line")


def _plan(run: Run) -> str:
    c, splits = run.config, run.data.splits
    tokens = c.batch_size * c.block_size * c.accumulate
    counts = ", ".join(f"{name} {split['tokens']:,}" for name, split in splits.items())
    about = run.model.config
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(about).items())
    mesh = f", {run.team.sizes} on {run.team.world} processes" if run.team else ""
    return (
        f"data      {c.data}: {counts} tokens\n"
        f"model     {describe(run.model)['kind']}, {run.model.num_params():,} parameters: {sizes}\n"
        f"training  {c.steps} steps of {tokens:,} tokens, {c.objective}, in {c.dtype} on {run.device}{mesh}"
    )


def _train(run: Run, console: Console) -> int:
    c = run.config
    if run.finished():
        console.print(
            f"{c.out} is finished; more steps go on from there, or choose another out", soft_wrap=True
        )
        return 0
    dtype = torch.bfloat16 if c.dtype == "float16" else c.torch_dtype  # which torch's CPU products crawl in
    (peak,) = ceilings.measure_flops(run.device, [dtype], seconds=0.1).values()
    flops = token_flops(run.model, c.block_size)
    try:
        with Live(console, c.steps, run.trainer.step, flops, max(peak.values())) as live:
            run.train([live])
    except Stopped as stopped:
        console.print(f"Saved after step {stopped.step}; the same command goes on from there.")
        return 128 + stopped.signal
    if run.leads:
        _report(run, console)
    return 0


def _report(run: Run, console: Console) -> None:
    if run.validations:
        loss = run.validations[-1][1]
        console.print(f"loss on held-out text {loss:.4f}, perplexity {math.exp(loss):.2f}")
    console.print(f"saved {run.path}", soft_wrap=True)
    if run.config.plot:
        try:
            from ..plots import losses
        except ImportError:
            console.print("No picture: matplotlib is missing; `pip install llmkern[plot]`")
        else:
            losses(run.path / "loss.png", read_log(run.path), str(run.path))
