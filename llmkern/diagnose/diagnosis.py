"""`diagnose`: measure a step, and say which wall it hits and what would move it."""

import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..ceilings import dtype_name
from ..ops import cached_bytes
from ..swap import swap_
from . import calibrate, energy
from .memory import peak
from .predict import Prediction, attempt, from_trace, predict
from .profile import Profile
from .remedies import remedies
from .report import WALLS, Diagnosis, rows_of
from .run import time_steps, trace, warm_up
from .trace import Tracer
from .units import size
from .workload import MODES, Workload, check_batch, fused_adamw

STEPS, SECONDS = 7, 12.0  # at most; of steps that are timed


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    mode: str = "train",
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.float32,
    kv_cache: tuple[Tensor, ...] = (),
    apply: bool = False,
    profile: Profile | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Which wall each op of a step hits, where memory is, and what would change that.

    Runs a few steps.  The model's parameters, gradients, buffers and mode are the same afterwards; with
    `apply` its modules are swapped.

    Args:
        model: any module, on one device.
        batch: a tensor, a tuple of arguments, a mapping of keyword arguments, or a DataLoader or other
            iterable of these, whose waiting time is then measured.
        mode: "train" (forward, loss, backward, optimizer) or "inference".
        loss_fn: (output, batch) -> scalar; None takes the output's `.loss`, or a scalar in it.
        make_optimizer: parameters -> optimizer; None is torch's fused AdamW.  The first step of a diagnosis
            uses a learning rate of 0; give yours one of 0 too.
        dtype: torch.bfloat16 or float16 runs forward under autocast.
        kv_cache: tensors of keys and values, to be shown as such.
        apply: `swap_` the model, measure again, and put it into `after`.
        profile: of this machine; None takes the one that was kept, or measures it, which takes a minute.
        say: told what is going on.

    Returns:
        A Diagnosis, to print.

    Raises:
        ValueError: an unknown mode, or a batch that the model does not take.
    """
    workload = _workload(model, batch, mode, loss_fn, make_optimizer, dtype, kv_cache)
    profile = profile or calibrate.profile(workload.device, dtype, say=say)
    with workload.unchanged():
        found = _examine(workload, profile, say)
        if apply:
            found.swap = str(swap_(model))
            again = Workload(model, workload.batch, mode, loss_fn, workload.make_optimizer, dtype, kv_cache)
            found.after = _examine(again, profile, say)
    return found


def _workload(model, batch, mode, loss_fn, make_optimizer, dtype, kv_cache) -> Workload:
    if mode not in MODES:
        raise ValueError(f"diagnose: mode is {mode!r}, expected one of {', '.join(MODES)}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"diagnose: model is {type(model).__name__}, expected a torch.nn.Module")
    if mode == "train" and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "diagnose: no parameter requires a gradient, so it cannot train; use mode='inference'"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "diagnose: the model is on meta and cannot run; `predict` takes it, or move it to a device"
        )
    if not isinstance(batch, (Tensor, tuple, list, dict)):
        batch = _forever(batch)
    workload = Workload(model, batch, mode, loss_fn, make_optimizer or fused_adamw, dtype, tuple(kv_cache))
    if isinstance(batch, (Tensor, tuple, list, dict)):
        check_batch(model, batch)
    return workload


def _forever(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader again and again, until it has none."""
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch


def _examine(workload: Workload, profile: Profile, say: Callable[[str], None]) -> Diagnosis:
    """Predict, run and measure."""
    say("predicting the step from its shapes")
    prediction, refused = attempt(lambda: predict(workload, profile))
    say("running and timing steps")
    _first_step(workload)
    allocated = _allocated(workload)
    times = time_steps(workload, STEPS, SECONDS)
    start = time.perf_counter()
    waits: list[float] = []
    tracer = trace(workload, waits=waits)
    traced = time.perf_counter() - start
    if prediction is None:
        workload.notes[f"not predictable before it ran ({refused}): predicted from the measured shapes"] = (
            None
        )
        prediction = from_trace(tracer, profile, workload.tokens)
    say("predicting what changes would bring")
    found = _report(workload, profile, prediction, tracer, times, sum(waits))
    found.allocated = allocated
    found.energy = energy.measure(workload.step, workload.device)
    found.remedies, missing = remedies(workload, prediction, found.seconds, profile)
    found.notes = [*workload.notes, *missing, *_doubts(found, traced)]
    return found


def _first_step(workload: Workload) -> None:
    try:
        warm_up(workload)
    except (RuntimeError, TypeError, IndexError) as error:
        first = str(error).partition("\n")[0]
        name = type(workload.model).__name__
        problem = f"diagnose: {name} cannot run a {workload.mode} step on this batch: {first}"
        raise ValueError(problem) from error


def _allocated(workload: Workload) -> int | None:
    """The most bytes that torch's allocator of a GPU handed out during a step; None on a CPU."""
    if workload.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    workload.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _report(
    workload: Workload,
    profile: Profile,
    prediction: Prediction,
    tracer: Tracer,
    times: list[float],
    wait: float,
) -> Diagnosis:
    calls, timeline = tracer.calls, tracer.ledger.timeline()
    seconds = median(times)
    walls = dict.fromkeys(WALLS, 0.0)
    for call in calls:
        walls[profile.wall(call)] += call.seconds
    walls["data"] = wait
    walls["launch"] += max(0.0, min(times) - sum(walls.values()))  # Python and dispatch between the calls
    scale = seconds / sum(walls.values())  # other steps were slower, or the tracer slowed this one
    phases = {call.phase: i for i, call in reversed(list(enumerate(calls)))}
    return Diagnosis(
        name=type(workload.model).__name__,
        mode=workload.mode,
        dtype=dtype_name(workload.dtype),
        parameters=sum(p.numel() for p in workload.model.parameters()),
        tokens=prediction.tokens,
        profile=profile,
        seconds=seconds,
        best=min(times),
        data_seconds=wait,
        rows=rows_of(calls, profile),
        walls={wall: scale * spent for wall, spent in walls.items()},
        flops=sum(c.flops for c in calls),
        model_flops=sum(c.model_flops for c in calls),
        parts=peak(timeline)[1],
        timeline=timeline,
        phases=dict(sorted(phases.items(), key=lambda item: item[1])),
        allocated=None,
        prediction=prediction,
        energy=energy.Energy(None, "not measured"),
    )


def _doubts(found: Diagnosis, traced: float) -> list[str]:
    """What a reader should know before believing the figures."""
    doubts = []
    beyond = max(found.rows, key=lambda row: row.ceiling * (row.seconds > 0.01 * found.seconds), default=None)
    if beyond is not None and beyond.seconds > 0.01 * found.seconds and beyond.ceiling > 1.05:
        doubts.append(
            f"{beyond.op} was faster than the ceiling that was measured, which was then too low: the machine "
            "was busy meanwhile; measure it again with --again"
        )
    if found.seconds > 1.2 * found.best:
        doubts.append(
            f"the machine was busy: the best step took {found.best:.3g} s, half of them more than "
            f"{found.seconds:.3g} s; run again when it is quiet"
        )
    if found.seconds > 2 * found.prediction.seconds:
        doubts.append(
            f"the step took {found.seconds / found.prediction.seconds:.1f} times what was predicted: "
            "something else may be using the machine, or it was measured in a better hour (--again)"
        )
    kept = cached_bytes() if found.profile.device == "cpu" else 0
    if kept > 0.05 * found.peak_bytes:
        doubts.append(
            f"llmkern keeps {size(kept)} that its last outputs had for the next ones, which are not counted "
            "here; llmkern.empty_cache() gives them back"
        )
    if found.walls["communication"]:
        doubts.append(
            "collectives were waited for one by one in the traced step: what computation hides of them "
            "otherwise is in their time too"
        )
    if traced > 1.3 * found.seconds + 0.05:
        doubts.append(
            f"the traced step took {traced:.3g} s, the others {found.seconds:.3g} s: single ops look too long"
        )
    return doubts
