"""Measure a model: the loss of a text, accuracy and F1 of a classifier, or tasks of lm-eval."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from .. import display, load
from ..errors import UserError
from ..models import Classifier
from ..text.documents import join
from ..text.labelled import encode_rows, read_table
from ..text.shards import Data
from .classes import score
from .language import predictability
from .show import save_scores, show_scores, show_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load.add_arguments(parser)
    parser.add_argument("data", metavar="DATA", nargs="?", help=
        "for a classifier a table of texts and labels; else text, or a folder of prepared data")  # fmt: skip
    parser.add_argument("--tasks", metavar="A,B", help="instead of DATA, tasks of lm-eval, such as hellaswag")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    parser.add_argument("--include-path", metavar="FOLDER", help="with the YAML files of more tasks")
    parser.add_argument("--few-shot", type=int, metavar="N", help="examples before each question of a task")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of the texts; text")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="of the labels; label")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of prepared data; val")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows; the context")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="measure only the first N tokens")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts or windows at once; 8")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for evaluation.json and confusion.png")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, expected 1 or more")
    if (args.data is None) == (args.tasks is None):
        raise UserError("expected DATA, such as a text or a table, or --tasks of the harness, and not both")
    model, tokenizer = load.load_from(args)
    console = display.make_console()
    measure = _tasks if args.tasks else _classes if isinstance(model, Classifier) else _language
    measure(console, args, model, tokenizer)
    return 0


def _classes(console: Console, args: argparse.Namespace, model: Classifier, tokenizer) -> None:
    rows = read_table(Path(args.data), args.text_column, args.label_column)
    examples = encode_rows(rows, model.config.labels, tokenizer, model.block_size)
    if examples.cut:
        console.print(f"{examples.cut:,} texts were longer than {model.block_size} tokens, and cut")
    scores = score(model, examples, args.batch_size)
    show_scores(console, scores)
    if args.out is not None:
        save_scores(console, args.out, scores, "evaluation", {"data": args.data})


def _language(console: Console, args: argparse.Namespace, model, tokenizer) -> None:
    tokens = _tokens(args, tokenizer)
    if args.max_tokens is not None:
        tokens = tokens[: args.max_tokens]
    size = len(tokenizer.decode(tokens[1:]).encode(errors="surrogatepass"))
    result = predictability(model, tokens, args.stride, args.batch_size, size)
    console.print(
        f"{result.tokens:,} tokens: loss {result.loss:.4f} nats, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte"
    )
    if args.out is not None:
        _save(console, args.out, {"data": args.data, **result.summary()})


def _tasks(console: Console, args: argparse.Namespace, model, tokenizer) -> None:
    try:
        from .harness import HarnessModel, measure_tasks
    except ImportError as error:
        raise UserError(f"--tasks needs the library lm-eval ({error}); `pip install llmkern[eval]`") from None
    adapter = HarnessModel(model, tokenizer, args.batch_size)
    results = measure_tasks(adapter, args.tasks.split(","), args.limit, args.few_shot, args.include_path)
    show_tasks(console, results)
    if args.out is not None:
        _save(console, args.out, {"tasks": results})


def _save(console: Console, folder: Path, found: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"Saved {path}.", soft_wrap=True)


def _tokens(args: argparse.Namespace, tokenizer) -> torch.Tensor:
    """The text as tokens; documents end with the end-of-text token where there is one."""
    if (Path(args.data) / "manifest.json").is_file():
        data = Data(args.data)
        if data.tokenizer.sha256() != tokenizer.sha256():
            raise UserError(f"data {args.data!r} has other tokens than the model; give the text itself")
        tokens = data.tokens(args.split)
        return torch.from_numpy(tokens.windows(np.zeros(1, np.int64), len(tokens))[0])
    return join([args.data], tokenizer, args.text_column)
