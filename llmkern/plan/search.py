"""Every strategy that fits, the fastest first."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..errors import UserError
from . import memory, step, work
from .hardware import GIB, Hardware
from .memory import CONTEXT, Memory
from .model import Model
from .step import StepTime
from .strategy import Recipe, Strategy, check

MICRO_BATCHES = (1, 2, 4, 8, 16)
INTERLEAVE = (1, 2, 3, 4, 6)
LONG = 16384  # tokens of a sequence from which on context parallelism is tried


@dataclass(frozen=True)
class Candidate:
    """One strategy that fits: its memory on the most loaded device, and its time."""

    strategy: Strategy
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what."""

    model: Model
    device: Hardware
    devices: int
    recipe: Recipe
    batch: int
    seq: int
    dtype: str = "bfloat16"

    def memory(self, strategy: Strategy) -> Memory:
        width = work.width(self.dtype)
        return memory.training(self.model, strategy, self.recipe, self.batch, self.seq, width)

    def fits(self, found: Memory) -> bool:
        return found.reserved + CONTEXT <= self.device.memory

    def candidate(self, strategy: Strategy) -> Candidate:
        time = step.predict(self.model, self.device, strategy, self.recipe, self.batch, self.seq, self.dtype)
        return Candidate(strategy, self.memory(strategy), time)


def strategies(job: Job, fixed: dict[str, Any]) -> Iterator[Strategy]:
    """Divisions of the job, without recomputation; `fixed` holds the fields that are given."""
    n, model = job.devices, job.model
    sizes = {
        "tp": _powers(min(n, job.device.node)),
        "pp": _divisors(model.layers, n) + [p for p in _divisors(model.layers + 2, n) if p > 1],
        "cp": _powers(n) if job.seq >= LONG else [1],
        "ep": _divisors(model.experts.count, n) if model.experts else [1],
        "zero": [0, 1, 3],
        "micro_batch": list(MICRO_BATCHES),
        "interleave": list(INTERLEAVE),
    }
    options = [[fixed[name]] if name in fixed else sorted(set(values)) for name, values in sizes.items()]
    rest = {k: v for k, v in fixed.items() if k not in sizes and k not in ("recompute", "dp")}
    for tp, pp, cp, ep, zero, micro_batch, interleave in product(*options):
        dp = n // (tp * pp * cp)
        if tp * pp * cp * dp != n or fixed.get("dp", dp) != dp:
            continue
        if "interleave" not in fixed and interleave > 1 and pp == 1:
            continue
        if "zero" not in fixed and zero and (dp * cp == 1 or (zero == 3 and pp > 1)):
            continue
        sizes = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "zero": zero, "micro_batch": micro_batch}
        yield Strategy(**{"sp": tp > 1, **sizes, "interleave": interleave, **rest})


def search(job: Job, fixed: dict[str, Any] | None = None, top: int = 5) -> list[Candidate]:
    """The `top` fastest strategies that fit; of each way to divide the model the best micro-batch.

    Args:
        job: what is to be trained, on what.
        fixed: fields of `Strategy` that are given.
        top: how many.

    Raises:
        UserError: no strategy divides the model, or none fits: by how much, and what would.
    """
    fixed = fixed or {}
    best: dict[tuple, Candidate] = {}
    least: Memory | None = None
    wrong: UserError | None = None
    for strategy in strategies(job, fixed):
        try:
            check(job.model, strategy, job.batch, job.seq)
        except UserError as error:
            wrong = wrong or error
            continue
        fitting, smallest = _least_recompute(job, strategy, fixed)
        least = smallest if least is None or smallest.reserved < least.reserved else least
        if fitting is None:
            continue
        found = job.candidate(fitting)
        key = (fitting.tp, fitting.pp, fitting.cp, fitting.ep, fitting.zero)
        if key not in best or found.time.total < best[key].time.total:
            best[key] = found
    if best:
        return sorted(best.values(), key=lambda c: c.time.total)[:top]
    if least is None:
        raise wrong or UserError(_does_not_divide(job.devices, fixed))
    raise UserError(_does_not_fit(job, fixed, least))


def _does_not_divide(devices: int, fixed: dict) -> str:
    sizes = {name: fixed[name] for name in ("dp", "tp", "pp", "cp", "ep") if name in fixed}
    given = " x ".join(f"{name} {size}" for name, size in sizes.items()) or "this strategy"
    return (
        f"{given} cannot use {devices} device{'s' * (devices > 1)}; expected sizes whose product divides it"
    )


def _least_recompute(job: Job, strategy: Strategy, fixed: dict) -> tuple[Strategy | None, Memory]:
    """The strategy with as little recomputation as fits, and the least memory that was seen."""
    kinds = ("none", "ops", "full") if strategy.flash else ("none", "selective", "full")
    for kind in (fixed["recompute"],) if "recompute" in fixed else kinds:
        tried = dataclasses.replace(strategy, recompute=kind)
        found = job.memory(tried)
        if job.fits(found):
            return tried, found
    return None, found


def _does_not_fit(job: Job, fixed: dict, least: Memory) -> str:
    """By how much, and the nearest number of devices that would do."""
    need = least.reserved + CONTEXT
    over = need - job.device.memory
    part = max(least.parts, key=least.parts.get)
    text = (
        f"{job.model.name} does not fit on {job.devices} x {job.device.title}: the least of all strategies "
        f"is {both(need)} a device, {both(over)} too much, most of it {part}"
    )
    if job.devices == 1:
        text += "; --serve plans inference alone"
    more = job.devices
    while more < 2**16:
        more *= 2
        batch = job.batch if job.batch % more == 0 else more
        larger = dataclasses.replace(job, devices=more, batch=batch)
        if any(_fits_somehow(larger, s, fixed) for s in strategies(larger, fixed)):
            return f"{text}; it would fit on {more}"
    return f"{text}; no number of these devices would do: take one with more memory"


def _fits_somehow(job: Job, strategy: Strategy, fixed: dict) -> bool:
    try:
        check(job.model, strategy, job.batch, job.seq)
    except UserError:
        return False
    return _least_recompute(job, strategy, fixed)[0] is not None


def both(size: float) -> str:
    """Bytes in GiB and in GB: the two are confused too often to print one."""
    return f"{size / GIB:,.1f} GiB ({size / 1e9:,.1f} GB)"


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [i for i in range(1, min(number, most) + 1) if number % i == 0]
