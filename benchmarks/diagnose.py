"""python -m benchmarks.diagnose: what `diagnose` predicts of training steps, against processes that run them.

A prediction is made from shapes alone, before anything runs.  Then the step runs in processes of its own that
know nothing of tracing: one for its time, and one for its memory, in which the C library and llmkern give
memory back as soon as it is free, so that the process is as large as its tensors are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import nn

from llmkern import machine, swap_
from llmkern.diagnose import Workload, calibrate, predict
from llmkern.diagnose.load import load
from llmkern.diagnose.run import warm_up
from llmkern.diagnose.units import duration, size
from llmkern.models import GPT, GPTConfig
from llmkern.ops import memory

from .measure import status
from .report import make_console

MODELS = {  # MODEL of `llmkern diagnose` -> sequences, tokens of each
    "examples/article.py:step": (32, 128),
    "nano": (16, 64),
    "gpt2": (1, 512),
}
STEPS, SECONDS = 9, 20.0
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
TARGETS = {"time": 0.20, "memory": 0.05}


@dataclass
class Row:
    """One model, plain or swapped; seconds of a step (None where none was timed) and bytes at its peak.

    Attributes:
        resident: bytes by which the process grew, with memory given back at once.
        process: the same with what the C library and llmkern keep by default.
    """

    model: str
    swapped: bool
    predicted_seconds: float | None
    predicted_bytes: int
    seconds: float | None = None
    times: list[float] | None = None
    resident: int = 0
    process: int = 0

    @property
    def time_error(self) -> float | None:
        return self.predicted_seconds / self.seconds - 1 if self.seconds else None

    @property
    def memory_error(self) -> float:
        return self.predicted_bytes / self.resident - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print and save every row; 0 always: a missed target is a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnose", description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--again", action="store_true", help="measure the machine again before")
    parser.add_argument(
        "--memory", action="store_true", help="memory alone, which a busy machine does not change"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--run", nargs=2, metavar=("MODEL", "HOW"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        print(json.dumps(run(*args.run)))
        return 0
    console = make_console()
    profile = None if args.memory else calibrate.profile("cpu", torch.float32, args.again, console.print)
    rows = []
    for name in args.models or MODELS:
        for swapped in (False, True):
            prediction = predict(_workload(name), profile, swap_ if swapped else None)
            rows.append(Row(name, swapped, prediction.seconds, prediction.peak_bytes))
    for row in rows:
        how = "swapped" if row.swapped else "plain"
        row.times, row.process = _child(row.model, how).values()
        row.resident = _child(row.model, f"{how} once", GIVE_BACK)["resident"]
        if not args.memory:
            row.seconds = median(row.times)
    about = machine.describe("cpu")
    console.print(table(rows), about)
    kind = "diagnose-memory" if args.memory else "diagnose"
    path = args.out / f"{kind}-{machine.slug(about['device'])}-{about['date']}.json"
    path.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    console.print(f"saved {path}")
    return 0


def table(rows: list[Row]) -> Table:
    """Predicted, measured and the error of both."""
    result = Table(title="A training step, predicted and run", title_justify="left")
    result.add_column("", no_wrap=True)
    names = ("step, predicted", "measured", "error", "memory, predicted", "measured", "error", "by default")
    for name in names:
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            f"{row.model}{', swapped' * row.swapped}",
            *map(_duration, (row.predicted_seconds, row.seconds)), _error(row.time_error, "time"),
            size(row.predicted_bytes), size(row.resident), _error(row.memory_error, "memory"),
            size(row.process),
        )  # fmt: skip
    return result


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _error(error: float | None, target: str) -> str:
    if error is None:
        return "-"
    return f"{100 * error:+.1f} %" + (" missed" if abs(error) > TARGETS[target] else "")


def _workload(name: str) -> Workload:
    torch.manual_seed(0)
    subject = load(name, *MODELS[name], "train", "cpu")
    return Workload(subject.model, subject.batch, loss_fn=subject.loss_fn)


def _child(name: str, how: str, environment: dict[str, str] | None = None) -> dict:
    command = [sys.executable, "-m", "benchmarks.diagnose", "--run", name, how]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, how: str) -> dict:
    """In a process of its own: {"times": seconds of steps, "resident": bytes it grew by at most}."""
    swapped, once = how.startswith("swapped"), how.endswith("once")
    if once:
        memory.keep(0)
    for small in (GPT(GPTConfig(65, 16, 1, 2, 32), kernels=False), nn.TransformerEncoderLayer(32, 2)):
        batch = torch.zeros(1, 16, dtype=torch.int64) if isinstance(small, GPT) else torch.zeros(16, 1, 32)
        _begin(Workload(small, batch), swapped).step()  # loads the code that every model needs
    before = status("VmRSS")
    workload = _begin(_workload(name), swapped)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    times = []
    while len(times) < (2 if once else STEPS) and sum(times) < SECONDS:
        start = time.perf_counter()
        workload.step()
        times.append(time.perf_counter() - start)
    return {"times": times, "resident": status("VmHWM") - before}


def _begin(workload: Workload, swapped: bool) -> Workload:
    """The same, swapped and after its first step."""
    if swapped:
        swap_(workload.model)
    warm_up(workload)
    return workload


if __name__ == "__main__":
    sys.exit(main())
