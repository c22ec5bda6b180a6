"""What a change would bring: the step traced again with the change made, on fake tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..optim import AdamW
from ..quantize import Int4WeightOnly, Int8WeightOnly, quantize_
from ..swap import swap_
from .predict import Prediction, attempt, predict
from .profile import Profile
from .units import percent, scaled
from .workload import Workload

DEVICES = 8  # over which FSDP is told
Change = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Remedy:
    """One change.

    Attributes:
        name: what it is; how: the line of code.
        speedup: tokens a second, as predicted, over those of the step as it is, as predicted.
        seconds: of a step then: those measured now, by the ratio of the two predictions.
        peak_bytes: of its tensors, predicted.
        reason: why.
    """

    name: str
    how: str
    speedup: float
    seconds: float
    peak_bytes: int
    reason: str


def remedies(
    workload: Workload, now: Prediction, measured: float, profile: Profile
) -> tuple[list[Remedy], list[str]]:
    """Those that gain most time first, then those that save most memory; and what could not be predicted."""
    found, missing = [], []
    for name, how, predicted, reason in _changes(workload, now, profile):
        then, refused = attempt(predicted)
        if then is None:
            missing.append(f"{name} could not be predicted: {refused}")
            continue
        speedup = (then.tokens / then.seconds) / (now.tokens / now.seconds)
        seconds = measured * then.seconds / now.seconds
        found.append(Remedy(name, how, speedup, seconds, then.peak_bytes, reason(then)))
    return sorted(found, key=lambda r: (-round(r.speedup, 2), r.peak_bytes)), missing


def _changes(
    workload: Workload, now: Prediction, profile: Profile
) -> Iterator[tuple[str, str, Callable[[], Prediction], Callable[[Prediction], str]]]:
    """(name, how, its prediction, reason from that) of each."""

    def tried(change: Change | None = None, **fields: Any) -> Callable[[], Prediction]:
        return lambda: predict(replace(workload, optimizer=None, notes={}, **fields), profile, change)

    def traffic(then: Prediction) -> str:
        return (
            f"{scaled(then.bytes, 'B')} cross the memory bus instead of {scaled(now.bytes, 'B')}, at "
            f"{percent(then.flops / now.flops)} of the operations"
        )

    yield (
        "swap_",
        "llmkern.swap_(model)",
        tried(_quietly(swap_)),
        lambda then: f"fused kernels: {traffic(then)}",
    )
    if workload.dtype == torch.float32:
        yield (
            "bfloat16", "torch.autocast(device, torch.bfloat16)", tried(dtype=torch.bfloat16),
            lambda then: f"products in bfloat16, whose ceiling here is {_gain(profile):.1f} times float32's",
        )  # fmt: skip
    yield (
        "twice the batch", "batch_size *= 2", lambda: predict(workload.repeated(2), profile),
        lambda then: "the weights, the optimizer and every launch serve twice the tokens",
    )  # fmt: skip
    if workload.mode == "train":
        yield (
            "llmkern.optim.AdamW", "llmkern.optim.AdamW(model.parameters())",
            tried(make_optimizer=lambda parameters: AdamW(parameters, lr=0.0)),
            lambda then: f"one pass over all parameters: {traffic(then)}",
        )  # fmt: skip
        if repeated_blocks(workload.model):
            yield (
                "checkpointing", "torch.utils.checkpoint.checkpoint(block, x)", tried(checkpoint_blocks),
                lambda then: "activations inside blocks are computed again in backward: "
                f"{then.flops / now.flops:.2f} times the operations",
            )  # fmt: skip
        if not any(isinstance(p, DTensor) for p in workload.model.parameters()):
            yield _fsdp(now)
    else:
        for bits, config in ((8, Int8WeightOnly()), (4, Int4WeightOnly())):
            yield (
                f"int{bits} weights", f"llmkern.quantize_(model, llmkern.{type(config).__name__}())",
                tried(_quietly(partial(quantize_, config=config))),
                lambda then, bits=bits: f"linears read {bits} bits a weight: {traffic(then)}",
            )  # fmt: skip


def _fsdp(now: Prediction) -> tuple[str, str, Callable[[], Prediction], Callable[[Prediction], str]]:
    """Weights, gradients and optimizer in equal parts (Rajbhandari et al. 2020, arXiv:1910.02054, sec. 5)."""
    split = {part: now.parts[part] // DEVICES for part in ("weights", "gradients", "optimizer")}
    parts = {**now.parts, **split}
    sent = 3 * (DEVICES - 1) / DEVICES * now.parts["weights"]
    return (
        f"FSDP, {DEVICES} devices", "torch.distributed.fsdp.fully_shard(model)",
        lambda: replace(now, parts=parts, peak_bytes=sum(parts.values())),
        lambda then: f"each holds an eighth of weights, gradients, optimizer and sends {scaled(sent, 'B')} a "
        "step; what that costs on a given network `llmkern plan` tells; memory is per device",
    )  # fmt: skip


def _gain(profile: Profile) -> float:
    return profile.peak(torch.bfloat16) / profile.peak(torch.float32)


def _quietly(change: Change) -> Change:
    """Without the warnings for a copy that nobody will use."""
    import warnings

    def changed(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model)

    return changed


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the longest ModuleList or Sequential whose modules are all of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    alike = [blocks for blocks in lists if len(blocks) > 1 and len({type(b) for b in blocks}) == 1]
    return max(alike, key=len, default=[])


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep of each repeated block only its input."""
    for block in repeated_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
