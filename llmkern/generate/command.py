"""Write text after a prompt, token by token, with any checkpoint."""

import argparse
import sys
import time
from pathlib import Path

from .. import load
from ..errors import UserError
from .engine import ModelEngine
from .sampling import Sampling
from .text import complete


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load.add_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], help="what to go on from; may be repeated")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt, or - for standard input")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="200 by default")
    parser.add_argument("--temperature", type=float, default=0.8, help="0.8; 0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the nucleus of mass P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only P times the likeliest's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is none")
    parser.add_argument("--seed", type=int, default=1337, help="prompt i draws with SEED + i")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.add_argument("--ignore-end", action="store_true", help="go on after the end-of-text token")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at once, 16")


def run(args: argparse.Namespace) -> int:
    for name in ("samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    sampling = Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)
    prompts = [prompt for prompt in _prompts(args) for _ in range(args.samples)]
    model, tokenizer = load.load_from(args)
    engine = ModelEngine(model, min(args.batch_size, len(prompts)), vocab_size=len(tokenizer))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model has
    alone = len(prompts) == 1
    if alone:
        _show(0, prompts[0])
    start = time.perf_counter()
    done = complete(
        engine, tokenizer, prompts, args.max_new_tokens, sampling,
        seed=args.seed, stop=args.stop, ignore_end=args.ignore_end, on_text=_show if alone else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    for i, completion in enumerate(done):
        print("" if alone else f"--- {i + 1} of {len(done)}\n{prompts[i]}{completion.text}")
    tokens = sum(completion.tokens for completion in done)
    print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)
    return 0


def _show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            text = sys.stdin.read() if str(args.prompt_file) == "-" else args.prompt_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {str(args.prompt_file)!r} cannot be read ({error})") from None
        prompts.append(text)
    return prompts or [""]
