"""`llmkern.plan`: everything about one model on one kind of hardware."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models import GPTConfig, LlamaConfig
from . import config, energy, hardware, inference, search
from .energy import Energy
from .flops import CONVENTIONS, Flops, flops, mfu
from .hardware import Hardware
from .inference import Inference
from .model import Model
from .search import Candidate, Job
from .strategy import RECIPES

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, arXiv:2203.15556, table 3
BATCHES = {1e9: 2**19, 5e9: 2**20, 5e10: 2**21, 3e11: 2**22}  # parameters below -> tokens, GPT-3 table 2.1
KERNELS: dict[str, dict[str, Any]] = {"fused": {"fused_ffn": True, "loss": "fused"}, "eager": {}}
LARGEST_BATCH = 2**24  # Llama 3 405B, arXiv:2407.21783, table 4


@dataclass(frozen=True)
class Run:
    """A whole training run with the fastest strategy.

    Attributes:
        tokens: that it sees; steps: of the optimizer.
        seconds: with the goodput.
        device_hours: of all devices.
        dollars: None without a price.
        energy: None without a power.
        goodput: part of the time that trains; the rest is restarts, checkpoints, waiting.
    """

    tokens: float
    steps: float
    seconds: float
    device_hours: float
    dollars: float | None
    energy: Energy | None
    goodput: float


@dataclass(frozen=True)
class Plan:
    """What `llmkern.plan` found.

    Attributes:
        job: model, device, how many, batch and sequence.
        flops: of a token, forward.
        candidates: the strategies that fit, the fastest first.
        run: the whole training run with the first of them.
        inference: prefill and decode on as few devices as hold the weights; None where a node does not.
    """

    job: Job
    flops: Flops
    candidates: list[Candidate]
    run: Run
    inference: Inference | None

    def __str__(self) -> str:
        from .show import text  # only who prints needs it

        return text(self)

    @property
    def best(self) -> Candidate:
        """The fastest strategy that fits."""
        return self.candidates[0]

    def tokens_per_second(self, candidate: Candidate) -> float:
        """Of all devices."""
        return self.job.batch * self.job.seq / candidate.time.total

    def mfu(self, candidate: Candidate) -> dict[str, float]:
        """Model FLOPs utilisation under each convention of attention."""
        rate = self.tokens_per_second(candidate) / self.job.devices
        peak = self.job.device.peak(self.job.dtype)
        return {name: mfu(rate * self.flops.training(name), peak) for name in CONVENTIONS}

    def hfu(self, candidate: Candidate) -> float:
        """Hardware FLOPs utilisation, attention whole."""
        rate = self.tokens_per_second(candidate) / self.job.devices
        done = self.flops.hardware(candidate.strategy.recompute)
        return mfu(rate * done, self.job.device.peak(self.job.dtype))


def plan(
    model: str | Path | Mapping[str, Any] | GPTConfig | LlamaConfig | Model,
    on: str | Hardware = "h100",
    gpus: int = 1,
    *,
    batch: int | None = None,
    seq: int | None = None,
    tokens: float | None = None,
    dtype: str | None = None,
    recipe: str = "mixed",
    strategy: Mapping[str, Any] | None = None,
    kernels: str = "fused",
    top: int = 5,
    goodput: float = 1.0,
    price: float | None = None,
    power: float | None = None,
    pue: float = energy.PUE,
    grid: str | float = "world",
    sequences: int = 1,
    prompt: int | None = None,
    reply: int = 256,
) -> Plan:
    """Plan a training run, and inference, before any hardware exists.

    Args:
        model: a name (`llmkern plan --list`), a Hugging Face config.json or its folder, the content of one,
            a `GPTConfig` or a `LlamaConfig`.
        on: a device's name, or a `Hardware`.
        gpus: how many devices.
        batch: sequences of a step; by default as many as a model of its size is trained with.
        seq: tokens of a sequence; by default the model's context, at most 8192.
        tokens: to train on; by default 20 a parameter (arXiv:2203.15556).
        dtype: of the matrix products; by default bfloat16, or what the device has in its place.
        recipe: what is kept for a parameter: "mixed", "megatron", "float32", "fsdp2", "adam8bit", "sgd".
        strategy: fields of `Strategy` that are given, such as `{"tp": 8, "zero": 3}`; the rest is searched.
        kernels: "fused" keeps what llmkern's feed-forward and loss keep; "eager" what torch's do.
        top: strategies to return.
        goodput: part of the time that trains.
        price: dollars a device-hour, in place of the catalogue's.
        power: measured watts of a device, in place of the datasheet's.
        pue: power of the building over that of its computers.
        grid: a country, or grams of CO2e a kWh.
        sequences: prompts at once, for inference.
        prompt, reply: tokens of each.

    Returns:
        The plan; `print` shows it as tables, as `llmkern plan` does.

    Raises:
        UserError: a strategy that does not divide the model, a model that fits nowhere, unknown names.
    """
    shape = config.find(model)
    device = on if isinstance(on, Hardware) else hardware.find(on)
    for name, value, most in (
        ("gpus", gpus, 2**17),
        ("goodput", goodput, 1),
        ("sequences", sequences, 2**20),
    ):
        if not 0 < value <= most:
            raise UserError(f"{name} is {value}, expected more than 0 and at most {most:,}")
    if recipe not in RECIPES:
        raise UserError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    if kernels not in KERNELS:
        raise UserError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}")
    dtype = dtype or default_dtype(device)
    device.peak(dtype)  # says what it has instead
    seq = seq or min(shape.context, 8192)
    batch = batch or default_batch(shape, seq, gpus)
    job = Job(shape, device, gpus, RECIPES[recipe], batch, seq, dtype)
    candidates = search.search(job, {**KERNELS[kernels], **(strategy or {})}, top)
    amount = tokens or TOKENS_PER_PARAMETER * shape.total
    hours = amount / (batch * seq) * candidates[0].time.total / goodput / 3600
    price = price if price is not None else device.price
    run = Run(
        amount,
        amount / (batch * seq),
        3600 * hours,
        hours * gpus,
        None if price is None else price * hours * gpus,
        energy.run(device, hours * gpus, pue, grid, power),
        goodput,
    )
    served = serve(shape, device, sequences, prompt or min(seq, 2048), reply, dtype)
    return Plan(job, flops(shape, seq), candidates, run, served)


def default_dtype(device: Hardware) -> str:
    """bfloat16, or the next best that the device has a rate for."""
    return next(name for name in ("bfloat16", "float16", *device.flops) if name in device.flops)


def default_batch(model: Model, seq: int, devices: int) -> int:
    """Sequences of a step, as models of its size are trained with, divisible by many numbers of replicas."""
    amount = next((tokens for size, tokens in BATCHES.items() if model.total < size), LARGEST_BATCH)
    return (
        max(amount // seq, 1) if devices & (devices - 1) == 0 else max(amount // seq // devices, 1) * devices
    )


def serve(
    model: Model, device: Hardware, sequences: int = 1, prompt: int = 2048, reply: int = 256,
    dtype: str | None = None,
) -> Inference | None:  # fmt: skip
    """Inference on the fewest devices of a node that hold weights and cache; None if a node does not."""
    count, dtype = 1, dtype or default_dtype(device)
    while count <= device.node and count <= model.heads:
        if model.heads % count == 0:
            found = inference.predict(model, device, count, sequences, prompt, reply, dtype)
            if found.weights + found.cache + search.CONTEXT <= device.memory:
                return found
        count *= 2
    return None
