"""The `llmkern` command.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`, and a line below.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from . import __version__
from .errors import UserError

COMMANDS = {
    "demo": "train a small GPT twice, as plain PyTorch and with the kernels, and compare the two",
    "info": "show versions, the processor, the GPU, and which kernels every op has here",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was wrong in one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build_parser() -> Parser:
    parser = Parser(prog="llmkern", description="Fused GPT kernels behind drop-in torch modules.")
    parser.add_argument("--version", action="version", version=f"llmkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = import_module(f"llmkern.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default this process's; return the exit code.

    0 is success, 1 a check that failed, 2 a mistake of the user, told in one sentence.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"llmkern: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
