"""A small run in processes that can be killed: children of a warm parent, so that each takes a moment."""

import hashlib
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np

from llmkern import durable
from llmkern.text import CharTokenizer
from llmkern.train.config import RunConfig
from llmkern.train.log import read_log
from llmkern.train.run import Run, Stopped

CALLS = ("open", "write", "fsync", "close", "rename", "replace", "makedirs")  # what touches the disk
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "dropout": 0.1}
QUICK = {
    "save_every": 2,
    "eval_every": 2,
    "eval_batches": 1,
    "batch_size": 2,
    "warmup_steps": 2,
    "plot": False,
}


def make_data(path: Path, length: int = 2000) -> Path:
    """A folder of tokens, as `llmkern data prepare` makes it, of a text with some order in it."""
    tokenizer = CharTokenizer("abcdefgh")
    tokens = (np.arange(length) ** 2 // 7 % 8).astype("<u2")
    with durable.NewFolder(path) as folder:
        folder.write("train-00000.bin", [tokens[: length // 2]])
        folder.write("train-00001.bin", [tokens[length // 2 : -200]])
        folder.write("val-00000.bin", [tokens[-200:]])
        folder.write("tokenizer.json", [tokenizer.to_json().encode()])
        folder.about = {
            "dtype": "<u2", "splits": {"train": {"tokens": length - 200}, "val": {"tokens": 200}},
        }  # fmt: skip
    return path


def config(data: Path, out: Path, **keys) -> RunConfig:
    return RunConfig(**{"data": str(data), "out": str(out), "steps": 6, **SIZES, **QUICK, **keys})


def train(settings: RunConfig, say=lambda sentence: None) -> None:
    """As `llmkern train` does; ends the process with its exit code where a signal came."""
    try:
        with Run(settings, say) as run:
            run.train()
    except Stopped as stopped:
        os._exit(128 + stopped.signal)


def start(function, *args) -> int:
    """Run it in a child process; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def call(function, *args) -> int:
    return wait(start(function, *args))


class Killer:
    """Stands for `os` in `durable` and kills the process before call number `at`; 0 only counts."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counted


def train_until(at: int, settings: RunConfig) -> None:
    """Train, and die before the disk is touched for the `at`-th time; small pieces make many times."""
    durable.os, durable.PIECE = Killer(at), 256
    train(settings)


def count_calls(settings: RunConfig, path: Path) -> None:
    durable.os, durable.PIECE = killer, _ = Killer(0), 256
    train(settings)
    path.write_text(str(killer.count))


def outcome(out: Path) -> tuple:
    """What must not depend on being killed: every line of the log but its times, and the last weights."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(out)]
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    weights = [hashlib.sha256((newest / f"{name}.safetensors").read_bytes()).hexdigest()
               for name in ("model", "optimizer")]  # fmt: skip
    return lines, newest.name, weights, sorted(p.name for p in newest.parent.iterdir())
