"""Train one model twice, as plain PyTorch and swapped, in turns, and measure both."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from . import _cpu, measure
from .models import GPT, GPTConfig
from .ops import dispatch
from .report import Report
from .swap import swap_
from .text import Batches
from .train import Record, TrainConfig, Trainer, evaluate
from .train.loop import adamw

VALIDATION_BATCHES = 4
TIMED_STEPS = 3


@dataclass
class Run:
    """One of the two trainings, and what was measured of it."""

    trainer: Trainer
    records: list[Record] = field(default_factory=list)
    validation_loss: float = 0.0
    peak_bytes: int = 0  # of the tensors that a step makes, gradients included; not the weights
    seconds_by_kind: dict[str, float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        return median(record.seconds for record in self.records)

    @property
    def tokens_per_second(self) -> float:
        return self.records[0].tokens / self.step_seconds


class Comparison:
    """The same GPT from the same seed on the same batches, as plain PyTorch and after `swap_`.

    Args:
        model: its shape.
        batches: to train on.
        config: how to train.
        seed: of the weights.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, model: GPTConfig, batches: Batches, config: TrainConfig, seed: int, device: str
    ) -> None:
        torch.manual_seed(seed)
        plain = GPT(model, kernels=False).to(device)
        swapped = copy.deepcopy(plain)
        self.report: Report = swap_(swapped)
        self.device = device
        self.plain, self.swapped = (
            Run(Trainer(each, batches, config, adamw(each, config, torch.optim.AdamW, fused=True)))
            for each in (plain, swapped)
        )
        self.kernels: dict[str, str] = {}  # half of an op, such as "ffn_bwd" -> backend

    def train(self, update: Callable[[Record, Record], None], seconds: float = math.inf) -> None:
        """Step by step one after the other, so that the noise of the machine hits both alike.

        Args:
            update: called with the two records of each step.
            seconds: start no step after this time.
        """
        end = time.monotonic() + seconds
        with dispatch.record() as calls:
            for pair in zip(self.plain.trainer, self.swapped.trainer):
                self.plain.records.append(pair[0])
                self.swapped.records.append(pair[1])
                update(*pair)
                if time.monotonic() > end:
                    break
        self.kernels = {half: _name(backend) for half, backend in sorted(calls)}

    def measure(self, held_out: Batches) -> None:
        """Validation loss and peak memory; then a few more steps, in turns, timed op by op."""
        runs = self.plain, self.swapped
        for run in runs:
            model, dtype = run.trainer.model, run.trainer.config.torch_dtype
            run.validation_loss = evaluate(model, held_out, VALIDATION_BATCHES, dtype)
            run.peak_bytes = measure.peak_bytes(run.trainer.advance)
        rounds = [
            [measure.time_by_kind(run.trainer.advance, self.device) for run in runs]
            for _ in range(TIMED_STEPS)
        ]
        for run, timings in zip(runs, zip(*rounds)):
            run.seconds_by_kind = {kind: median(t[kind] for t in timings) for kind in timings[0]}

    def largest_difference(self, steps: int | None = None) -> float:
        """Between the losses of the two, over the first `steps`, by default all."""
        pairs = zip(self.plain.records[:steps], self.swapped.records[:steps])
        return max(abs(plain.loss - swapped.loss) for plain, swapped in pairs)

    def backends_by_op(self) -> dict[str, str]:
        """What ran each op: "cpp (avx2)", or "cpp (avx2), reference" if its halves ran on two backends."""
        result: dict[str, list[str]] = {}
        for half, backend in self.kernels.items():
            backends = result.setdefault(half.removesuffix("_fwd").removesuffix("_bwd"), [])
            backends += [backend] if backend not in backends else []
        return {op: ", ".join(backends) for op, backends in result.items()}

    def speedup(self) -> float:
        """Median step time of the plain run over that of the swapped one."""
        return self.plain.step_seconds / self.swapped.step_seconds


def _name(backend: str) -> str:
    return f"cpp ({_cpu.best()})" if backend == "cpp" else backend
