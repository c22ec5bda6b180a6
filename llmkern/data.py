"""Prepare text for training: clean it, remove duplicates, tokenise it into memory-mapped shards."""

import argparse
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from . import display
from .errors import UserError
from .text.clean import Filter
from .text.prepare import Options, prepare
from .text.shards import Data
from .text.sources import Sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="data_command")
    _add_prepare(commands.add_parser("prepare", help="make a folder of tokens from text, JSONL and Parquet"))
    check = commands.add_parser("verify", help="compare every byte of a prepared folder with its checksum")
    check.add_argument("folder", type=Path)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=parser)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="a file, a folder, shakespeare or python-docs")
    add("--out", type=Path, required=True, help="the folder to make")
    add("--tokenizer", default="char", help="char, byte, bpe, hub:NAME or a tokenizer.json; default char")
    add("--vocab-size", type=int, default=4096, help="of a BPE that is trained here; default 4096")
    add("--val", type=float, default=0.1, help="share of the documents to validate with; default 0.1")
    add("--seed", type=int, default=0, help="which documents these are; default 0")
    add("--field", default="text", help="of the text in JSONL and Parquet; default text")
    add("--separator", help=r"cuts text files into documents, such as '\n\n'; by default a file is one")
    add("--encoding", default="utf-8", help="of text and JSONL; default utf-8")
    add("--min-characters", type=int, default=1, help="drop shorter documents")
    add("--max-repeated-lines", type=float, default=1.0, help="drop documents with a larger share of such")
    add("--min-letters", type=float, default=0.0, help="drop documents with a smaller share of letters")
    add("--near-duplicates", type=float, default=0.8, help="similarity to drop from; 0 is off; default 0.8")
    add("--workers", type=int, default=0, help="processes; default one for each core")
    add("--force", action="store_true", help="replace the folder if it is there")


def run(args: argparse.Namespace) -> int:
    return _prepare(args) if args.data_command == "prepare" else _verify(args)


def _prepare(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.force:
        raise UserError(f"--out {str(args.out)!r} is there already; choose another, or --force replaces it")
    separator = args.separator and args.separator.encode().decode("unicode_escape")
    sources = Sources(args.sources, args.field, separator, args.encoding)
    rules = Filter(**{f.name: getattr(args, f.name) for f in fields(Filter)})
    options = {f.name: getattr(args, f.name) for f in fields(Options) if f.name != "filter"}
    console = display.make_console()
    with display.counting(console, "documents") as progress:
        manifest = prepare(sources, args.out, Options(**options, filter=rules), progress)
    _show(console, args.out, manifest)
    return 0


def _show(console: Console, out: Path, manifest: dict) -> None:
    dropped = ", ".join(f"{n:,} {why}" for why, n in manifest["dropped"].items()) or "none"
    console.print(f"documents  {manifest['documents']:,}, dropped: {dropped}")
    about = manifest["tokenizer"]
    console.print(f"tokenizer  {about['kind']}, {about['tokens']:,} tokens")
    for split, counts in manifest["splits"].items():
        console.print(
            f"{split:<10} {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
            f"{counts['characters']:,} characters, split {manifest['split']}"
        )
    console.print(f"saved      {out}", soft_wrap=True)


def _verify(args: argparse.Namespace) -> int:
    data = Data(args.folder)
    size = sum(about["bytes"] for about in data.manifest["files"].values())
    display.make_console().print(
        f"{args.folder} is whole: {len(data.manifest['files'])} files, {size:,} bytes"
    )
    return 0
