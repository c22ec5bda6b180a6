"""Train a small GPT twice from one seed, as plain PyTorch and after `swap_`, and compare the two."""

import argparse
import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from . import __version__, display, text
from .compare import Comparison
from .errors import UserError
from .models import GPTConfig, preset
from .train import TrainConfig

AGREE_STEPS, AGREE_WITHIN = 50, 1e-3  # how long, and how closely, float32 losses must agree
TRAIN_SECONDS = 180  # the demo's patience where a machine is slow or busy; --steps overrides it
SAMPLE_TOKENS = 300
WARMUP_STEPS = 20
DTYPES = ("float32", "bfloat16")


class Size(NamedTuple):
    """A model and how long it trains; the corpus sets the model's vocabulary."""

    model: GPTConfig
    batch_size: int
    steps: int


PRESETS = {
    "nano": Size(preset("nano"), 8, 50),  # seconds
    "small": Size(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256), 8, 200),  # 3 min, 2 cores
    "shakespeare-char": Size(preset("shakespeare-char"), 16, 400),
    "gpt2": Size(preset("gpt2"), 8, 200),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="CORPUS",
        help="shakespeare (the default), python-docs, or a UTF-8 text file of your own",
    )
    parser.add_argument("--preset", choices=PRESETS, help="size of the model: small, or on a GPU gpt2")
    parser.add_argument("--steps", type=_positive, help="training steps, by default those of the preset")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 trains under autocast")
    parser.add_argument("--seed", type=_positive, default=1337)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for demo.png and demo.json"
    )
    parser.add_argument("--no-plot", action="store_true", help="save no demo.png")


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 1")
    return int(value)


def run(args: argparse.Namespace) -> int:
    console = display.make_console()
    device = _pick_device(args.device)
    size = PRESETS[args.preset or ("gpt2" if device == "cuda" else "small")]
    _make_folder(args.out)
    corpus = text.load(args.data)
    tokenizer = text.CharTokenizer(corpus.text)
    model = dataclasses.replace(size.model, vocab_size=len(tokenizer))
    config = TrainConfig(args.steps or size.steps, warmup_steps=WARMUP_STEPS, dtype=args.dtype)
    batches, held_out = (
        text.Batches(tokens, size.batch_size, model.block_size, args.seed, device)
        for tokens in text.split(tokenizer.encode(corpus.text))
    )
    comparison = Comparison(model, batches, config, args.seed, device)
    console.print(_plan(corpus, comparison, size.batch_size, args.dtype))
    with display.progress(console, config.steps) as update:
        comparison.train(update, math.inf if args.steps else TRAIN_SECONDS)
    done = len(comparison.plain.records)
    if done < config.steps:
        console.print(
            f"Stopped after {done} steps: {TRAIN_SECONDS} s are over; --steps {config.steps} goes on."
        )
    comparison.measure(held_out)
    display.show_comparison(console, comparison, AGREE_STEPS)
    _save(console, args, comparison, corpus)
    console.print("\nThe swapped model writes:")
    console.print(_write(comparison, tokenizer, args.seed), soft_wrap=True)
    return _verdict(console, comparison)


def _pick_device(name: str) -> str:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device is cuda, but this PyTorch sees no GPU; leave it out or use --device cpu")
    return ("cuda" if there else "cpu") if name == "auto" else name


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "demo.json").touch()  # better to fail now than after the training
    except OSError as error:
        raise UserError(
            f"--out {str(path)!r} cannot be written to ({error.strerror}); choose another"
        ) from None


def _plan(corpus: text.Corpus, comparison: Comparison, batch_size: int, dtype: str) -> str:
    trainer = comparison.plain.trainer
    model, config = trainer.model, trainer.model.config
    return (
        f"corpus    {corpus.name}, {len(corpus.text):,} characters, from {corpus.origin}\n"
        f"model     GPT, {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, "
        f"{model.num_params():,} parameters\n"
        f"training  {trainer.config.steps} steps of {batch_size} x {config.block_size} tokens in {dtype} "
        f"on {comparison.device}, for each of the two\n"
        f"{comparison.report}"
    )


def _save(console: Console, args: argparse.Namespace, comparison: Comparison, corpus: text.Corpus) -> None:
    """demo.json, and demo.png where matplotlib is installed."""
    numbers = _numbers(args, comparison, corpus)
    path = args.out / "demo.json"
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    saved = [path]
    if not args.no_plot:
        try:
            from .plots import loss_and_throughput
        except ImportError:
            console.print("No picture: matplotlib is missing; `pip install llmkern[plot]`")
        else:
            saved.append(args.out / "demo.png")
            curves = {"plain PyTorch": comparison.plain.records, "llmkern": comparison.swapped.records}
            loss_and_throughput(saved[-1], curves, f"One GPT on {corpus.name}, twice, from the same seed")
    console.print(f"Saved {' and '.join(str(path) for path in saved)}.")


def _numbers(args: argparse.Namespace, comparison: Comparison, corpus: text.Corpus) -> dict:
    """Everything that was measured, as plain values; times in seconds, losses in nats per token."""
    runs = {"plain": comparison.plain, "swapped": comparison.swapped}
    return {
        "versions": {"llmkern": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": comparison.device,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "seed": args.seed,
        "corpus": {"name": corpus.name, "characters": len(corpus.text)},
        "model": dataclasses.asdict(comparison.plain.trainer.model.config),
        "kernels": comparison.kernels,
        "speedup": comparison.speedup(),
        f"largest_loss_difference_first_{AGREE_STEPS}": comparison.largest_difference(AGREE_STEPS),
        "largest_loss_difference": comparison.largest_difference(),
        **{
            name: {
                "tokens_per_second": run.tokens_per_second,
                "validation_loss": run.validation_loss,
                "peak_bytes": run.peak_bytes,
                "seconds_by_kind": run.seconds_by_kind,
                "loss": [record.loss for record in run.records],
                "seconds": [record.seconds for record in run.records],
            }
            for name, run in runs.items()
        },
    }


def _write(comparison: Comparison, tokenizer: text.CharTokenizer, seed: int) -> str:
    """A sample of the swapped model's own text, after token 0: in most texts the line break."""
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=comparison.device)
    generator = torch.Generator(comparison.device).manual_seed(seed)
    model = comparison.swapped.trainer.model.eval()
    return tokenizer.decode(model.generate(prompt, SAMPLE_TOKENS, 0.8, generator=generator)[0]).strip()


def _verdict(console: Console, comparison: Comparison) -> int:
    """Exit code 1 if float32 losses went apart."""
    if comparison.plain.trainer.config.dtype != "float32":
        return 0
    difference = comparison.largest_difference(AGREE_STEPS)
    if difference <= AGREE_WITHIN:
        return 0
    console.print(
        f"FAILED: the losses differ by {difference:.1e} within the first {AGREE_STEPS} steps, "
        f"expected at most {AGREE_WITHIN}"
    )
    return 1
