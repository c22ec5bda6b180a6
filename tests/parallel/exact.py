"""Training on a mesh against training by one process, in processes that are started once for a whole file."""

import os
import socket
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig
from llmkern.parallel import Parallel, Sizes, start
from llmkern.parallel.outer import Outer
from llmkern.parallel.tensor import by_kinds
from llmkern.train import TrainConfig, Trainer
from llmkern.train.loop import adamw

STEPS, ROWS, BLOCK, VOCAB = 20, 4, 16, 32


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, BLOCK, 2, 4, 32), **options)


def llama(**options) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(VOCAB, 32, 48, 2, 4, 2, max_position_embeddings=BLOCK, **options))


class Rows:
    """`batches[step]`: some rows of each step's batch.

    The second, sixth, ... batches are short, as the last of a text: the last process of four has no row of
    them.  The fourth, eighth, ... have targets that do not count.
    """

    def __init__(self, first: int = 0, last: int = ROWS) -> None:
        self.mine = slice(first, last)

    def __getitem__(self, step: int):
        make = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (ROWS - (step % 4 == 1), BLOCK + 1), generator=make)
        targets = tokens[:, 1:].clone()
        if step % 4 == 3:
            targets[: ROWS // 2 + 1, BLOCK // 2 :] = -100
        return tokens[self.mine, :-1].clone(), targets[self.mine]


def config(**keys) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "warmup_steps": 2, "grad_clip": 0.5, **keys})


def steady(model, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW that does not make whole steps of gradients that are nothing but rounding.

    With its own eps, 1e-8, two trainings of one process, in float32 and float64, part by 4e-5 in four steps.
    """
    return adamw(model, settings, torch.optim.AdamW, eps=1e-6)


class Course(NamedTuple):
    """What a training went through: (loss, norm) of each step, and the gradients of some, by name."""

    records: list[tuple[float, float]]
    gradients: list[dict[str, torch.Tensor]]


def train(model, keys: dict, parallel: Parallel | None = None) -> Course:
    rows, packed = Rows(), {}
    if parallel is not None:
        part, packed = ROWS // parallel.data_world, parallel.packed
        rows = Rows(parallel.data_rank * part, (parallel.data_rank + 1) * part)
    settings = config(**keys)
    optimizer = steady(model, settings)
    trainer, gradients = Trainer(model, rows, settings, optimizer, parallel), []
    named = parallel.parameters() if parallel else dict(model.named_parameters())
    names = {p: name for name, p in named.items()}

    def remember(*_) -> None:
        if trainer.step % 5 in (0, 4):
            found = {names[p]: p.grad for group in optimizer.param_groups for p in group["params"]}
            gradients.append({name: whole(g, packed.get(name)) for name, g in found.items()})

    optimizer.register_step_pre_hook(remember)
    return Course([(r.loss, r.grad_norm) for r in trainer], gradients)


def train_apart(make: Callable, keys: dict, outer: Outer, replicas: int = 2) -> Course:
    """Replicas in one process, each on its rows, that agree as DiLoCo's algorithm 1 says."""
    models, settings, each = [make() for _ in range(replicas)], config(**keys), ROWS // replicas
    trainers = [
        Trainer(model, Rows(n * each, (n + 1) * each), settings, steady(model, settings))
        for n, model in enumerate(models)
    ]
    agreed = [p.detach().clone() for p in models[0].parameters()]
    velocities, records, weights = [torch.zeros_like(p) for p in agreed], [], []
    for step, found in enumerate(zip(*trainers), 1):
        records.append((sum(r.loss for r in found) / replicas, sum(r.grad_norm for r in found) / replicas))
        if step % outer.every:
            continue
        with torch.no_grad():
            for p, v, *own in zip(agreed, velocities, *(model.parameters() for model in models)):
                way = sum(p - w for w in own) / replicas
                v.mul_(outer.momentum).add_(way)
                p.sub_(outer.learning_rate * (way + outer.momentum * v))  # Nesterov's
                for w in own:
                    w.copy_(p)
        weights.append({name: p.clone() for (name, _), p in zip(models[0].named_parameters(), agreed)})
    return Course(records, weights[-1:])


def whole(t: torch.Tensor, heads: int | None) -> torch.Tensor:
    """All of it, in the order of a model that was never divided."""
    t = t.full_tensor() if isinstance(t, DTensor) else t.clone()
    return by_kinds(t, heads) if heads else t


def compare(name: str, got: Course, expected: Course, rtol: float) -> None:
    """Losses, norms, gradients; `rtol` is relative to the largest of each."""
    for step, (mine, theirs) in enumerate(zip(got.records, expected.records, strict=True)):
        for a, b in zip(mine, theirs):
            assert abs(a - b) <= rtol * abs(b), f"{name}: step {step} gives {mine}, expected {theirs}"
    for mine, theirs in zip(got.gradients, expected.gradients, strict=True):
        for key, value in mine.items():
            worst, largest = (value - theirs[key]).abs().max().item(), theirs[key].abs().max().item()
            assert worst <= rtol * largest, f"{name}: d {key} is off by {worst:.2e} of {largest:.2e}"


def check(
    name: str, sizes: Sizes, make: Callable, keys: dict, micro_batch: int = 1, rtol: float = 1e-5
) -> None:
    expected = train(make(), keys)
    model = make()
    mesh, dtype = start(sizes, "cpu", timeout=60), config(**keys).torch_dtype
    parallel = Parallel(model, mesh, dtype, micro_batch=micro_batch)
    got = train(model, keys, parallel)
    compare(name, got, expected, rtol)
    every: list = [None] * sizes.world
    torch.distributed.all_gather_object(every, list(got.gradients[0]))
    assert set().union(*every) == expected.gradients[0].keys(), f"{name}: not every gradient was compared"


def _main(rank: int, world: int, port: int, work: Callable, *args) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    work(*args)
    torch.distributed.destroy_process_group()


def processes(world: int, work: Callable, *args) -> None:
    """Run `work(*args)` in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_main, (world, port, work, *args), nprocs=world)
