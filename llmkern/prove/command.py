"""Prove that a model computes the same after swap_: its outputs, gradients and losses against float64."""

import argparse
import json

import torch

from ..diagnose.command import positive
from ..errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPILOG = """examples:
  llmkern prove gpt2
  llmkern prove runs/shakespeare --batch 4 --length 128
  llmkern prove mycode.py:make_model       # returns a model, (model, batch) or (model, batch, loss_fn)

The exit code is 0 if everything is as it must be, 1 if not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a preset (gpt2, ...), a checkpoint's or Hugging Face model's folder, a .gguf file, or "
        "module:function or file.py:function",
    )
    parser.add_argument("--batch", type=positive, default=2, help="sequences, 2 by default")
    parser.add_argument("--length", type=positive, default=64, help="tokens of each, 64 by default")
    parser.add_argument("--steps", type=positive, default=5, help="of AdamW, whose losses are compared")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")


def run(args: argparse.Namespace) -> int:
    from ..diagnose.load import load
    from ..load import pick_device
    from . import prove

    torch.manual_seed(0)
    subject = load(args.model, args.batch, args.length, "train", pick_device(args.device))
    model = subject.model.to(DTYPES[args.dtype])
    try:
        proof = prove(model, subject.batch, subject.loss_fn, args.steps)
    except ValueError as error:
        raise UserError(f"{args.model} cannot be proved: {error}") from error
    print(json.dumps(proof.to_dict()) if args.json else f"{proof.swapped}\n\n{proof}")
    return 0 if proof.passed else 1
