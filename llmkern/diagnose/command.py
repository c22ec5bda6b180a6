"""Run one step of a model, and say which hardware wall it hits and what would move it."""

import argparse
import json
from pathlib import Path

import torch

from ..errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """examples:
  llmkern diagnose gpt2 --batch 2 --length 512
  llmkern diagnose gpt2 --mode decode --batch 1
  llmkern diagnose mycode:make_model --apply --html wall.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a preset (gpt2, ...), a checkpoint's or Hugging Face model's folder, or module:function or "
        "file.py:function that returns a model, (model, batch) or (model, batch, loss_fn)",
    )
    parser.add_argument("--batch", type=positive, default=4, help="sequences of a step, 4 by default")
    parser.add_argument("--length", type=positive, help="tokens of each, by default up to 1024")
    parser.add_argument(
        "--mode", choices=("train", "inference", "decode"), default="train",
        help="a training step (the default), a forward, or one token after LENGTH tokens in a cache",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float16 and bfloat16: autocast")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--apply", action="store_true", help="swap the model, measure again, compare")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page too")
    parser.add_argument(
        "--again", action="store_true", help="measure the machine again, which takes a minute"
    )


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least 1")
    return int(value)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..load import pick_device
    from . import calibrate, keep
    from .diagnosis import diagnose
    from .load import load
    from .terminal import WIDTH, render

    plain = {"highlight": False, "markup": False, "emoji": False}
    console, progress = Console(**plain), Console(stderr=True, **plain)
    if not console.is_terminal:
        console = Console(**plain, width=WIDTH)
    device = pick_device(args.device)
    if args.html is not None and not args.html.absolute().parent.is_dir():
        raise UserError(f"--html is {str(args.html)!r}, but its folder does not exist")
    subject = load(args.model, args.batch, args.length, args.mode, device)
    dtype = DTYPES[args.dtype]
    profile = calibrate.profile(device, dtype, args.again, progress.print)
    name = keep.save(profile).name
    found = diagnose(
        subject.model, subject.batch, mode="train" if args.mode == "train" else "inference",
        loss_fn=subject.loss_fn, dtype=dtype, kv_cache=subject.kv_cache, apply=args.apply, profile=profile,
        say=progress.print,
    )  # fmt: skip
    found.name = args.model
    found.notes += [*subject.notes, f"`llmkern plan MODEL --on {name}` plans for this machine as measured"]
    console.print_json(json.dumps(found.to_dict())) if args.json else console.print(render(found))
    if args.html is not None:
        found.save_html(args.html)
        progress.print(f"saved {args.html}")
    return 0
