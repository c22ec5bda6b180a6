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
    """`batches[step]`: some rows of each step's batch; the fourth has targets that do not count."""

    def __init__(self, first: int = 0, last: int = ROWS) -> None:
        self.mine = slice(first, last)

    def __getitem__(self, step: int):
        make = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (ROWS, BLOCK + 1), generator=make)
        targets = tokens[:, 1:].clone()
        if step % 4 == 3:
            targets[: ROWS // 2 + 1, BLOCK // 2 :] = -100
        return tokens[self.mine, :-1].clone(), targets[self.mine]


def config(**keys) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "warmup_steps": 2, "grad_clip": 0.5, **keys})


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
    optimizer = adamw(model, settings, torch.optim.AdamW)
    trainer, gradients = Trainer(model, rows, settings, optimizer, parallel), []
    named = parallel.parameters() if parallel else dict(model.named_parameters())
    names = {p: name for name, p in named.items()}

    def remember(*_) -> None:
        if trainer.step % 5 in (0, 4):
            found = {names[p]: p.grad for group in optimizer.param_groups for p in group["params"]}
            gradients.append({name: whole(g, packed.get(name)) for name, g in found.items()})

    optimizer.register_step_pre_hook(remember)
    return Course([(r.loss, r.grad_norm) for r in trainer], gradients)


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


def check(name: str, sizes: Sizes, make: Callable, keys: dict, rtol: float = 1e-5) -> None:
    expected = train(make(), keys)
    model = make()
    parallel = Parallel(model, start(sizes, "cpu", timeout=60), config(**keys).torch_dtype)
    compare(name, train(model, keys, parallel), expected, rtol)


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
