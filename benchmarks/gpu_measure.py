"""One target of a GPU run measured: llmkern and every peer, in turn, in one run."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from llmkern.ceilings import Ceilings
from llmkern.ops import OPS
from llmkern.ops.op import Make

from . import gpu_peers, peers
from .gpu_targets import Goal
from .measure import Call, Clock, Settings, interleave, peak_bytes, ratio

GLUON = "llmkern, Gluon"  # the attention kernels for sm_90, which the default leaves out until proven


@dataclass
class Verdict:
    """What a target reached; times in seconds, and a sentence for each peer that is not there."""

    op: str
    half: str
    label: str
    runs_on: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    times_faster: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    teraflops: float | None = None
    bandwidth: float | None = None
    memory: float | None = None
    missed: list[str] = field(default_factory=list)


@contextmanager
def gluon(on: bool) -> Iterator[None]:
    before = os.environ.get("LLMKERN_GLUON")
    os.environ["LLMKERN_GLUON"] = "1" if on else "0"
    try:
        yield
    finally:
        os.environ.pop("LLMKERN_GLUON") if before is None else os.environ.update(LLMKERN_GLUON=before)


def measure(
    goal: Goal, device: str, scale: int, clock: Clock, found: Ceilings, settings: Settings
) -> Verdict:
    """Measure a target; a peer that fails has the first line of its error."""
    torch.compiler.reset()
    gc.collect()
    op = OPS[goal.op]
    sample = goal.sample(Make(torch.bfloat16, device), scale)
    verdict = Verdict(goal.op, goal.half, goal.label)
    bound, choices = peers.examine(op, sample, goal.half, found)
    verdict.runs_on = peers.backend_name(choices)
    make = peers.forward if goal.half == "fwd" else peers.forward_backward
    functions = {"llmkern": op.public, **gpu_peers.functions(op, device)}
    calls: dict[str, Call] = {}
    for name, function in functions.items():
        if isinstance(function, str):
            verdict.absent[name] = function
        else:
            attempt(name, make(op, function, sample), calls, verdict)
    if goal.op == "attention" and device == "cuda":
        attempt(GLUON, within(gluon, make(op, op.public, sample)), calls, verdict)
    times = interleave(clock, calls, settings)
    verdict.seconds = {name: median(values) for name, values in times.items()}
    best = min((n for n in (GLUON, "llmkern") if n in times), key=verdict.seconds.get, default=None)
    if best is None:
        verdict.missed.append("llmkern failed: " + verdict.absent["llmkern"])
        return verdict
    ours = times[best]
    verdict.times_faster = {n: ratio(v, ours) for n, v in times.items() if n not in (GLUON, "llmkern")}
    verdict.teraflops = bound.flops / verdict.seconds[best] / 1e12
    verdict.bandwidth = bound.memory / verdict.seconds[best]
    if goal.memory is not None and "eager" in calls:
        both = [peak_bytes(calls[name], device) or 0 for name in (best, "eager")]
        verdict.memory = both[0] / max(1, both[1])
    verdict.missed += misses(goal, verdict) if device == "cuda" else ["a dry run judges nothing"]
    return verdict


def within(context: Callable, call: Call) -> Call:
    def run():
        with context(True):
            return call()

    return run


def attempt(name: str, call: Call, calls: dict[str, Call], verdict: Verdict) -> None:
    try:
        call()
        calls[name] = call
    except Exception as error:  # whatever stops a peer stands in the results
        verdict.absent[name] = (
            f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        )


def misses(goal: Goal, v: Verdict) -> Iterator[str]:
    """A sentence for each part of the target that was not reached."""
    rivals = {n: t for n, t in v.times_faster.items() if n in goal.peers or not goal.peers}
    if goal.ratio is not None and rivals and min(rivals.values()) < goal.ratio:
        name = min(rivals, key=rivals.get)
        yield f"{rivals[name]:.2f} times as fast as {name}, wanted {goal.ratio}"
    for name, wanted in goal.against.items():
        if v.times_faster.get(name, wanted) < wanted:
            yield f"{v.times_faster[name]:.2f} times as fast as {name}, wanted {wanted}"
    for name, reached, wanted in (
        ("TFLOP/s", v.teraflops, goal.teraflops),
        ("of the copy rate", v.bandwidth, goal.bandwidth),
    ):
        if wanted is not None and reached is not None and reached < wanted:
            yield f"{reached:.2f} {name}, wanted {wanted}"
    if goal.memory is not None and v.memory is not None and v.memory > goal.memory:
        yield f"{v.memory:.2f} of eager's memory, wanted {goal.memory}"
