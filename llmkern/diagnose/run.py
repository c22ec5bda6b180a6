"""Run one step under the tracer, on real or on fake tensors."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from .trace import Tracer
from .workload import Workload


def warm_up(workload: Workload) -> None:
    """One step, after which the optimizer has its state and memory was touched."""
    workload.prepare()
    workload.step()


def trace(workload: Workload, timed: bool = True, waits: list[float] | None = None) -> Tracer:
    """The next step, traced; seconds of waiting for its batch are appended to `waits`."""
    tracer = Tracer(workload.model, workload.device, timed)
    _know(tracer, workload)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        tracer.phase, start = name, time.perf_counter()
        yield
        if name == "data" and waits is not None:
            waits.append(time.perf_counter() - start)

    with tracer.gradients_of(workload.model), tracer:
        workload.step(phase)
    tracer.ledger.call_it_logits(workload.logits)
    tracer.ledger.keep_scratch(tracer.scratch)
    return tracer


def _know(tracer: Tracer, workload: Workload) -> None:
    """Tell the ledger what is there before the step."""
    ledger = tracer.ledger
    ledger.add(workload.kv_cache, "KV cache")
    ledger.add((list(workload.model.parameters()), list(workload.model.buffers())), "weights")
    if workload.optimizer is not None:
        ledger.add([dict(state) for state in workload.optimizer.state.values()], "optimizer")
    ledger.add(workload.batch, "inputs")


def trace_fake(workload: Workload, change: Callable[[nn.Module], Any] | None = None) -> Tracer:
    """The same without computing anything: shapes, FLOPs, bytes and memory, and no times."""
    try:
        return _trace_fake(workload, change)
    except DataDependentOutputException:
        if change is None:
            raise
    twin = replace(workload, model=copy.deepcopy(workload.model))
    change(twin.model)  # looks at values, as `swap_` does where it tries what a module computes
    return _trace_fake(twin)


def _trace_fake(workload: Workload, change: Callable[[nn.Module], Any] | None = None) -> Tracer:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twin = workload.faked(mode, change)
        warm_up(twin)
        return trace(twin, timed=False)


def time_steps(workload: Workload, steps: int, seconds: float) -> list[float]:
    """Seconds of up to `steps` steps that are not traced; fewer if they take more than `seconds` in all."""
    times: list[float] = []
    while len(times) < steps and (not times or sum(times) < seconds):
        start = time.perf_counter()
        workload.step()
        if workload.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times
