"""Every speed target of the CPU kernels, and how it is measured.

A target is a ratio against the fastest peer, the median over interleaved rounds; for some also a
fraction of the ceiling that was measured in the same run, or of memory.  Peers are eager torch and
torch.compile; for AdamW torch's own settings; for scaling the same op on one thread.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import median
from typing import NamedTuple

import torch

import llmkern
from llmkern.ceilings import Ceilings, dtype_name
from llmkern.ops import OPS
from llmkern.ops.dispatch import tensors
from llmkern.ops.op import Make, Op, Sample

from . import step
from .measure import Call, Clock, Settings, interleave, ratio
from .peers import calls, examine
from .suite import Case, Row, run_case

PEERS = ["llmkern", "eager", "compile"]
SETTINGS = Settings(rounds=5, seconds=0.02, budget=1.0)
STEP_SETTINGS = Settings(rounds=9, seconds=0.05, budget=5.0)
FLOAT, HALF = torch.float32, torch.bfloat16


class Target(NamedTuple):
    """What one half of an op must reach on each of its benchmark samples whose label begins so.

    Attributes:
        ratio: times faster than the fastest peer; None where only the ceiling counts.
        ceiling: fraction of the roofline.
        memory: most memory beside inputs and results, as a fraction of `memory_of`.
    """

    op: str
    label: str
    dtype: torch.dtype
    half: str
    ratio: float | None
    ceiling: float | None = None
    memory: float | None = None


TARGETS = {  # group -> its targets
    "linear": [
        Target("linear", "2048", FLOAT, "fwd", 1.25, 0.85),
        Target("linear", "2048", HALF, "fwd", 1.05, 0.87),
    ],
    "ffn": [Target("ffn", "2048", FLOAT, "fwd+bwd", 1.25), Target("ffn", "2048", HALF, "fwd+bwd", 1.15)],
    "attention": [
        Target("attention", "", dtype, half, goal, memory=1 / 8 if half == "fwd+bwd" else None)
        for dtype, goal in ((FLOAT, 2.0), (HALF, 3.0))
        for half in ("fwd", "fwd+bwd")
    ],
    "norm": [
        Target(op, label, FLOAT, "fwd+bwd", goal, ceiling)
        for op, goal in (("layer_norm", 3.0), ("rms_norm", 8.0))
        for label, ceiling in (("4096x768", None), ("4096x4096", 0.8))
    ],
    "cross_entropy": [
        Target("cross_entropy", "2048x50257", dtype, "fwd+bwd", 2.0) for dtype in (FLOAT, HALF)
    ],
    "linear_cross_entropy": [
        Target("linear_cross_entropy", "2048x50257", dtype, "fwd+bwd", 1.2, memory=1 / 8)
        for dtype in (FLOAT, HALF)
    ],
    "gemv": [
        Target("quant_linear", f"{code} 1x{shape}", HALF, "fwd", None, 0.8)
        for code in ("int8", "int4 g32")
        for shape in ("768x50304", "8192x2048")
    ],
}
MEMORY_OF = {
    "attention": ("llmkern",),
    "linear_cross_entropy": ("llmkern", "eager"),
}  # who is measured for it
COLD = 2**28  # bytes of weights, larger than any cache
SCALING = 1.85  # from one thread to two
SCALED = ("linear", "ffn", "attention", "layer_norm")  # their first benchmark samples
ADAMW = {"default": 5.0, "fused": 1.0}  # settings of torch.optim.AdamW -> how many times faster
ADAMW_SHAPES = [(1536, 384)] * 52  # 31 M parameters
STEPS = {  # group -> name of the step, ratio in float32 and under bfloat16 autocast
    "step-small": ("4 x 128, 12 x 64", 1.5, 1.5),
    "step-medium": ("6 x 384, 12 x 256", 1.3, 1.5),
    "step-gpt2": ("GPT-2 124M, 2 x 512", 1.6, 1.6),
}


@dataclass
class Verdict:
    """One target and what was reached; times in seconds, peers with (seconds, times faster than it)."""

    group: str
    what: str
    dtype: str
    half: str
    seconds: float
    peers: dict[str, tuple[float, float]]
    target: float | None
    ceiling: float | None = None
    ceiling_target: float | None = None
    memory: float | None = None
    memory_target: float | None = None
    reached: float | None = field(init=False)
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        self.reached = min((times for _, times in self.peers.values()), default=None)
        self.ok = (
            (self.target is None or (self.reached is not None and self.reached >= self.target))
            and (self.ceiling_target is None or (self.ceiling or 0) >= self.ceiling_target)
            and (
                self.memory_target is None or (self.memory is not None and self.memory <= self.memory_target)
            )
        )


def op_verdicts(group: str, clock: Clock, found: Ceilings) -> Iterator[Verdict]:
    for target in TARGETS[group]:
        op = OPS[target.op]
        for sample in op.benchmarks(Make(target.dtype)):
            if not sample.label.startswith(target.label):
                continue
            case = Case(op, sample, target.dtype, target.half)
            asked = MEMORY_OF.get(target.op, ()) if target.memory else ()
            measured = run_case(case, "cpu", PEERS, clock, found, SETTINGS, asked)
            rows = {row.peer: row for row in measured}
            ours = rows.pop("llmkern")
            yield Verdict(
                group, f"{op.name} {sample.label}", dtype_name(target.dtype), target.half, ours.median_s,
                {peer: (row.median_s, row.speedup) for peer, row in rows.items() if row.speedup is not None},
                target.ratio, ours.ceiling, target.ceiling,
                memory_fraction(case, ours, rows["eager"]) if target.memory else None, target.memory,
            )  # fmt: skip


def memory_fraction(case: Case, ours: Row, eager: Row) -> float | None:
    """Peak memory beside inputs and results: for attention of its scores, else of eager torch's."""
    if ours.peak_bytes is None:
        return None
    call = calls(case.op, case.sample, case.half, ["llmkern"])["llmkern"]
    results = sum(t.nbytes for t in tensors(call()))
    if case.op.name == "attention":
        query, key = case.sample.args[:2]
        whole = 4 * math.prod(query.shape[:3]) * key.shape[2]
    else:
        whole = max(0, (eager.peak_bytes or 0) - results)
    return max(0, ours.peak_bytes - results) / whole if whole else None


def gemv_verdicts(group: str, clock: Clock, found: Ceilings) -> Iterator[Verdict]:
    """Weights come from memory, as in generation, not from a cache: a call takes the next of many copies."""
    for target in TARGETS[group]:
        op = OPS[target.op]
        for sample in op.benchmarks(Make(target.dtype)):
            if not sample.label.startswith(target.label):
                continue
            copies = [copied(sample) for _ in range(math.ceil(COLD / sample.args[1].nbytes))]
            made = {peer: in_turn(op, copies, peer) for peer in ("llmkern", "eager")}
            times = interleave(clock, made, SETTINGS)
            bound, _ = examine(op, sample, target.half, replace(found, cold=True))
            ours, eager = times["llmkern"], times["eager"]
            yield Verdict(
                group, f"{op.name} {sample.label}", dtype_name(target.dtype), target.half, median(ours),
                {"eager": (median(eager), ratio(eager, ours))}, target.ratio,
                bound.seconds / median(ours), target.ceiling,
            )  # fmt: skip


def copied(sample: Sample) -> Sample:
    """The same in other memory, with the dense weight that eager torch takes."""
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
    args[1].dense = sample.args[1].dense.clone()
    return Sample(sample.label, tuple(args), sample.kwargs)


def in_turn(op: Op, samples: list[Sample], peer: str) -> Call:
    turn = cycle([calls(op, sample, "fwd", [peer])[peer] for sample in samples])
    return lambda: next(turn)()


def scaling_verdicts(group: str, clock: Clock, found: Ceilings) -> Iterator[Verdict]:
    threads = torch.get_num_threads()
    for name in SCALED if threads > 1 else ():
        op = OPS[name]
        sample = next(op.benchmarks(Make(FLOAT)))
        call = calls(op, sample, "fwd", ["llmkern"])["llmkern"]

        def on(count: int, call: Call = call) -> Call:
            def run() -> None:
                torch.set_num_threads(count)
                call()

            return run

        times = interleave(clock, {"2 threads": on(2), "1 thread": on(1)}, SETTINGS)
        torch.set_num_threads(threads)
        both, one = times["2 threads"], times["1 thread"]
        peers = {"1 thread": (median(one), ratio(one, both))}
        yield Verdict(group, f"{name} {sample.label}", dtype_name(FLOAT), "fwd", median(both), peers, SCALING)


def adamw_verdicts(group: str, clock: Clock, found: Ceilings) -> Iterator[Verdict]:
    def stepper(cls: type, **options: bool) -> Call:
        parameters = [torch.randn(shape).requires_grad_() for shape in ADAMW_SHAPES]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return cls(parameters, **options).step

    steps = {"llmkern": stepper(llmkern.optim.AdamW), "default": stepper(torch.optim.AdamW)}
    steps["fused"] = stepper(torch.optim.AdamW, fused=True)
    times = interleave(clock, steps, SETTINGS)
    ours = times.pop("llmkern")
    size = sum(math.prod(s) for s in ADAMW_SHAPES)
    ceiling = 28 * size / found.rate(28 * size) / median(ours)
    for peer, goal in ADAMW.items():
        peers = {peer: (median(times[peer]), ratio(times[peer], ours))}
        what = f"{size / 1e6:.0f} M parameters"
        yield Verdict(group, what, dtype_name(FLOAT), "step", median(ours), peers, goal, ceiling)


def step_verdicts(group: str, clock: Clock, found: Ceilings) -> Iterator[Verdict]:
    name, *goals = STEPS[group]
    for case in step.steps():
        if case.name != name:
            continue
        torch.compiler.reset()
        gc.collect()
        times = interleave(clock, step.calls(case, PEERS), STEP_SETTINGS)
        ours = times.pop("llmkern")
        peers = {peer: (median(values), ratio(values, ours)) for peer, values in times.items()}
        yield Verdict(
            group, name, dtype_name(case.dtype), "step", median(ours), peers, goals[case.dtype == HALF]
        )


GROUPS: dict[str, Callable[[str, Clock, Ceilings], Iterator[Verdict]]] = {
    **dict.fromkeys(TARGETS, op_verdicts),
    "gemv": gemv_verdicts,
    "adamw": adamw_verdicts,
    "scaling": scaling_verdicts,
    **dict.fromkeys(STEPS, step_verdicts),
}
ROOFED = {*TARGETS, "adamw"}  # groups whose lines are compared with the ceilings
