"""Seconds of a training step of two processes that divide matrices, exchanges behind products and not.

    python -m benchmarks.overlap             # half a minute on 2 cores

One thread each, on gloo; both ways in every round, in turns; written to benchmarks/results/overlap-DATE.json.
"""

import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.multiprocessing as mp

from llmkern.machine import commit, describe
from llmkern.models import GPT, GPTConfig
from llmkern.parallel import Parallel, Sizes, overlap, start

SHAPE = GPTConfig(vocab_size=512, block_size=512, n_layer=4, n_head=8, n_embd=512)
ROWS, ROUNDS = 2, 16


@contextmanager
def at_once(pieces: int) -> Iterator[None]:
    """Every exchange ends before anything else begins; a feed-forward takes its tokens in so many pieces."""
    real, usual = overlap.Flight.start, overlap.PIECES

    def whole(flight, way, x) -> None:
        real(flight, way, x)
        flight.going = iter([next(flight.going)])

    overlap.Flight.start, overlap.PIECES = whole, pieces
    try:
        yield
    finally:
        overlap.Flight.start, overlap.PIECES = real, usual


WAYS = {
    "behind products": nullcontext,
    "at once, in halves": partial(at_once, 2),
    "at once, whole": partial(at_once, 1),
}


def work(rank: int, port: int, path: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parallel = Parallel(GPT(SHAPE), start(Sizes(tp=2), "cpu"))
    tokens = torch.randint(SHAPE.vocab_size, (ROWS, SHAPE.block_size + 1))
    batch = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]

    def step() -> float:
        torch.distributed.barrier()
        before = time.perf_counter()
        parallel.backward(batch, lambda module, *given: module(*given)[1])
        return time.perf_counter() - before

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + 2):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            with WAYS[way]():
                found[way].append(step())
    found = {way: seconds[2:] for way, seconds in found.items()}
    if rank == 0:
        behind = found["behind products"]
        for way, seconds in found.items():
            times = quantiles([a / b for a, b in zip(seconds, behind)], n=4)
            print(f"{way}: {median(seconds):.3f} s, {times[1]:.3f} ({times[0]:.3f} to {times[2]:.3f}) times")
        about = {"commit": commit(), "machine": describe("cpu")}
        path.write_text(json.dumps({**about, "seconds": found}, indent=1) + "\n")
    torch.distributed.destroy_process_group()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(__file__).parent / "results" / f"overlap-{datetime.date.today()}.json"
    mp.spawn(work, (port, path), nprocs=2)


if __name__ == "__main__":
    main()
