"""Exchanges of tensor parallelism that run behind products: when each begins and ends, and the same bits."""

from collections.abc import Callable
from functools import partial

import exact
import pytest
import torch
from exact import gpt, llama

from llmkern.models import GPT
from llmkern.ops import OPS
from llmkern.parallel import Parallel, Sizes, overlap, start, tensor

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# of one layer of a GPT, without what comes from elsewhere: forward, then backward
TIMELINE = """
    all_gather begins, all_gather ends, linear,
    all_gather begins, all_gather begins,
    all_gather ends, ffn, reduce_scatter begins,
    all_gather ends, ffn, reduce_scatter begins,
    reduce_scatter ends, reduce_scatter ends,

    all_gather begins, all_gather begins,
    all_gather ends, ffn gradients, reduce_scatter begins,
    all_gather ends, ffn gradients, reduce_scatter begins,
    reduce_scatter ends, reduce_scatter ends,
    linear dx, reduce_scatter begins, linear dW, reduce_scatter ends
"""


def plain() -> GPT:
    return gpt(kernels=False)


def step(parallel: Parallel) -> float:
    return parallel.backward([exact.Rows()[3]], lambda module, *batch: module(*batch)[1])


def gradients(make: Callable) -> dict[str, torch.Tensor]:
    """Of one step, this process's part, and its loss."""
    parallel = Parallel(make(), start(Sizes(tp=2), "cpu", timeout=60))
    loss = step(parallel)
    found = {name: p.grad.to_local().clone() for name, p in parallel.parameters().items()}
    return {**found, "loss": torch.tensor(loss)}


class Log(list):
    """What happens, in order; `restore` ends it."""

    def __init__(self) -> None:
        self.kept = []
        self.around(overlap.Flight, "start", self._begins, self._nothing)
        self.around(overlap.Flight, "land", self._nothing, self._ends)
        for name, calls in (("ffn", self._ffn), ("linear", self._linear)):
            for half in ("fwd", "bwd"):
                self.around(OPS[name], half, partial(calls, half), self._nothing)

    def around(self, owner: object, name: str, before: Callable, after: Callable) -> None:
        real = getattr(owner, name)
        self.kept.append((owner, name, real))

        def logged(*args, **kwargs):
            before(*args)
            result = real(*args, **kwargs)
            after(*args)
            return result

        setattr(owner, name, logged)

    def restore(self) -> None:
        for owner, name, real in self.kept:
            setattr(owner, name, real)

    def _nothing(self, *args) -> None:
        pass

    def _begins(self, flight, way, x) -> None:
        flight.name = way.__name__
        self.append(f"{way.__name__} begins")

    def _ends(self, flight) -> None:
        self.append(f"{flight.name} ends")

    def _ffn(self, half, *args) -> None:
        self.append("ffn" if half == "fwd" else "ffn gradients")

    def _linear(self, half, *args) -> None:
        needs = "" if half == "fwd" else " dx" if args[-1][0] else " dW"
        self.append("linear" + needs)


def one() -> GPT:
    """Of one layer; the linear behind attention waits for its exchanges, and is torch's: not in the log."""
    model = gpt()
    del model.transformer.h[1:]
    model.transformer.h[0].attn.c_proj.__class__ = torch.nn.Linear
    return model


def timeline() -> None:
    parallel = Parallel(one(), start(Sizes(tp=2), "cpu", timeout=60))
    log = Log()
    try:
        step(parallel)
    finally:
        log.restore()
    expected = [event.strip() for event in TIMELINE.split(",")]
    assert log == expected, "\n".join(log)


def at_once(start: Callable, flight: overlap.Flight, way: Callable, x: torch.Tensor) -> None:
    """An exchange that has ended before anything else begins."""
    start(flight, way, x)
    flight.going = iter([next(flight.going)])


def same_bits() -> None:
    """Without overlap: exchanges end at once, and linears make all their gradients before dx is sent."""
    real, plain_linear = overlap.Flight.start, tensor._plain
    for make in (gpt, plain, llama):
        with_overlap = gradients(make)
        overlap.Flight.start = lambda *args: at_once(real, *args)
        tensor._plain = lambda linear: False
        try:
            without = gradients(make)
        finally:
            overlap.Flight.start, tensor._plain = real, plain_linear
        assert with_overlap.keys() == without.keys()
        for name, value in with_overlap.items():
            assert value.equal(without[name]), f"{make.__name__}: {name} has other bits"


def both() -> None:
    timeline()
    same_bits()


def test_products_run_while_bytes_are_on_their_way():
    exact.processes(2, both)
