"""Train a checkpoint on: to classify texts, with a head on it, or to go on writing like other texts."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import display, load
from ..errors import UserError
from ..evaluate import score
from ..evaluate.classes import majority
from ..evaluate.show import save_scores, show_scores
from ..models import Classifier
from ..text import Tokenizer
from ..text.labelled import ExampleBatches, Examples, Row, encode_rows, find_labels, hold_out, read_table
from ..train import checkpoint
from .adapt import adapt, save_updates, train_config
from .causal import train_causal
from .fit import Epoch, balanced_weights, fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load.add_arguments(parser, weights=False)
    add = parser.add_argument
    add(
        "data", type=Path, metavar="DATA", help="a .csv, .tsv, .jsonl or .parquet file; with causal also text"
    )
    add("--task", choices=("classify", "causal"), default="classify", help="classify by default")
    add("--out", type=Path, default=Path("runs/finetune"), help="the new run's folder; runs/finetune")
    add("--val", type=Path, metavar="FILE", help="to validate with, instead of a share of DATA")
    add("--val-share", type=float, default=0.1, metavar="P", help="of DATA to validate with; 0.1")
    add("--text-column", default="text", metavar="NAME", help="of the texts; text")
    add("--label-column", default="label", metavar="NAME", help="of the labels; label")
    add("--label-map", metavar="A=X,B=Y", help="other names for labels, as 0=negative,1=positive")
    add("--max-tokens", type=int, metavar="N", help="longer texts are cut; by default the model's context")
    add("--epochs", type=int, default=4, help="passes over DATA; 4")
    add(
        "--patience", type=int, default=2, metavar="N", help="epochs without gain before it stops; 0 is never"
    )
    add("--batch-size", type=int, default=16, metavar="N", help="texts in a step; 16")
    add("--learning-rate", type=float, metavar="R", help="5e-5, or 5e-4 with LoRA")
    add("--weight-decay", type=float, default=0.01, metavar="W", help="0.01")
    add("--class-weights", choices=("none", "balanced"), default="none", help="weight of rare classes")
    add(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="train low-rank updates alone; 0 trains everything",
    )
    add("--lora-alpha", type=float, metavar="A", help="2 RANK by default")
    add("--lora-dropout", type=float, default=0.0, metavar="P", help="of the updates' inputs; 0")
    add("--seed", type=int, default=1337, help="of the head, the order and the held-out share")


def run(args: argparse.Namespace) -> int:
    _check(args)
    torch.manual_seed(args.seed)
    model, tokenizer = load.load_from(args)
    console = display.make_console()
    if args.task == "causal":
        return train_causal(console, args, model, tokenizer)
    rows, val_rows = _read(args)
    labels = find_labels(rows)
    context = (model.base if isinstance(model, Classifier) else model).config.block_size
    limit = min(context, args.max_tokens or context)
    train = encode_rows(rows, labels, tokenizer, limit)
    if val_rows is None:
        train, held_out = hold_out(train, labels, args.val_share, args.seed)
    else:
        held_out = encode_rows(val_rows, labels, tokenizer, limit)
    model = _classifier(model, labels)
    if args.class_weights == "balanced":
        model.class_weights = balanced_weights(train, len(labels)).to(next(model.parameters()).device)
    adapt(args, model)
    _say_plan(console, args, model, train, held_out, limit)
    start = time.perf_counter()
    epochs = _train(console, args, model, train, held_out)
    _save(console, args, model, tokenizer, held_out, epochs, time.perf_counter() - start)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("lora", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {least} or more")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}, expected 1 or more")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}, expected more than 0, and less than 1")
    if (args.out / checkpoint.FOLDER).exists():
        raise UserError(f"--out {str(args.out)!r} holds a run already; choose another folder")


def _read(args: argparse.Namespace) -> tuple[list[Row], list[Row] | None]:
    """The rows to train on and to validate with, their labels renamed."""
    names = {}
    for pair in filter(None, (args.label_map or "").split(",")):
        old, equals, new = pair.partition("=")
        if not equals or not new:
            raise UserError(f"--label-map has {pair!r}, expected OLD=NEW with commas between such pairs")
        names[old] = new
    tables = [
        [row._replace(label=names.get(row.label, row.label)) for row in table]
        for table in (read_table(path, args.text_column, args.label_column)
                      for path in (args.data, args.val) if path is not None)
    ]  # fmt: skip
    return tables[0], tables[1] if len(tables) > 1 else None


def _classifier(model: torch.nn.Module, labels: tuple[str, ...]) -> Classifier:
    """The model with a new head, unless it has one for these labels."""
    if isinstance(model, Classifier):
        return model if model.config.labels == labels else Classifier.on(model.base, labels)
    return Classifier.on(model, labels)


def _train(
    console: Console, args: argparse.Namespace, model: Classifier, train: Examples, held_out: Examples
) -> list[Epoch]:
    batches = ExampleBatches(train, args.batch_size, args.seed, next(model.parameters()).device)
    config = train_config(args, args.epochs * batches.epoch_steps)

    def tell(epoch: Epoch) -> None:
        scores = epoch.held_out
        console.print(
            f"epoch {epoch.number}/{args.epochs}: loss {epoch.loss:.4f}, held-out {scores.loss:.4f}, "
            f"accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, {epoch.seconds:.0f} s"
            + (" (best)" if epoch.best else "")
        )

    epochs = fit(
        model, batches, batches.epoch_steps, config, lambda: score(model, held_out, args.batch_size),
        args.patience, tell,
    )  # fmt: skip
    if len(epochs) < args.epochs:
        console.print(f"Stopped: {args.patience} epochs without a smaller held-out loss.")
    return epochs


def _say_plan(
    console: Console, args: argparse.Namespace, model: Classifier, train: Examples, held_out: Examples,
    limit: int,
) -> None:  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    labels = ", ".join(model.config.labels)
    console.print(f"texts    {len(train):,} to train on, {len(held_out):,} to validate with", soft_wrap=True)
    console.print(f"labels   {labels}", soft_wrap=True)
    console.print(
        f"model    {type(model.base).__name__}, {trained:,} of {model.num_params():,} parameters are trained"
    )
    if train.cut:
        console.print(f"         {train.cut:,} texts were longer than {limit} tokens, and cut")
    console.print(f"naming the most frequent class has accuracy {majority(held_out.classes):.4f}")


def _save(
    console: Console, args: argparse.Namespace, model: Classifier, tokenizer: Tokenizer,
    held_out: Examples, epochs: list[Epoch], seconds: float,
) -> None:  # fmt: skip
    """A checkpoint of the best epoch, with updates merged; the updates alone; scores and their picture."""
    args.out.mkdir(parents=True, exist_ok=True)
    save_updates(args, model)
    scores = score(model, held_out, args.batch_size)
    show_scores(console, scores)
    history: list[dict[str, Any]] = [
        {"epoch": e.number, "loss": e.loss, "val_loss": e.held_out.loss, "accuracy": e.held_out.accuracy}
        for e in epochs
    ]
    path = checkpoint.save(args.out, len(epochs), model, tokenizer)
    save_scores(console, args.out, scores, "finetune", {"seconds": seconds, "epochs": history})
    console.print(f"The classifier is in {path}.", soft_wrap=True)
