"""The `llmkern` command.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`, and a line below: the module
of that name, or `command` in the package of that name.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from . import __version__
from .errors import UserError

COMMANDS = {
    "data": "prepare text: clean it, remove duplicates, tokenise it into shards",
    "demo": "train a small GPT twice, as plain PyTorch and with the kernels, and compare the two",
    "diagnose": "run one step of a model: which hardware wall every op hits, and what would move it",
    "evaluate": "measure a model on text, or a classifier on labelled texts",
    "finetune": "train a checkpoint on, to classify texts or to write like others; with or without LoRA",
    "generate": "write text after a prompt with any checkpoint",
    "train": "pre-train a model on prepared data, and go on where it was stopped or killed",
    "info": "show versions, the processor, the GPU, and which kernels every op has here",
    "prove": "check that a model computes the same with the kernels: errors against float64, gradients, bits",
    "plan": "plan a model on hardware you have not got: memory, time, money, energy, and the wall that binds",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was wrong in one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say which argument this command does not know, and which one is like it."""
        known = [option for action in self._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        near = difflib.get_close_matches(word, known, 1)
        self.error(f"{word} is unknown" + (f"; did you mean {near[0]}?" if near else ""))


def build_parser() -> Parser:
    parser = Parser(prog="llmkern", description="Fused GPT kernels behind drop-in torch modules.")
    parser.add_argument("--version", action="version", version=f"llmkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = _module(name)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def _module(name: str) -> ModuleType:
    module = import_module(f"llmkern.{name}")
    return import_module(f"llmkern.{name}.command") if hasattr(module, "__path__") else module


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default this process's; return the exit code.

    0 is success, 1 a check that failed, 2 a mistake of the user, told in one sentence.
    """
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.command.refuse(unknown)
    try:
        return args.run(args)
    except UserError as error:
        print(f"llmkern: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
