"""Training on a mesh against training by one process, in processes that are started once for a whole file."""

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from llmkern.models import GPT, GPTConfig, Llama, LlamaConfig
from llmkern.parallel import Parallel, Sizes, start
from llmkern.train import TrainConfig, Trainer

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


def train(model, keys: dict, parallel: Parallel | None = None) -> tuple[list, dict]:
    """(loss and norm of each step, weights at the end)."""
    rows = Rows()
    if parallel is not None:
        part = ROWS // parallel.data_world
        rows = Rows(parallel.data_rank * part, (parallel.data_rank + 1) * part)
    settings = config(**keys)
    optimizer = None
    if parallel is None:
        from llmkern.train.loop import adamw

        optimizer = adamw(model, settings, torch.optim.AdamW)
    records = [(r.loss, r.grad_norm) for r in Trainer(model, rows, settings, optimizer, parallel)]
    return records, weights(model)


def weights(model) -> dict[str, torch.Tensor]:
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def compare(name: str, got, expected, rtol: float) -> None:
    """Losses, norms and weights; `rtol` is relative to the largest of each."""
    for step, (mine, theirs) in enumerate(zip(got[0], expected[0])):
        for a, b in zip(mine, theirs):
            assert abs(a - b) <= rtol * abs(b), f"{name}: step {step} gives {mine}, expected {theirs}"
    for key, value in got[1].items():
        worst = (value - expected[1][key]).abs().max().item()
        limit = rtol * max(expected[1][key].abs().max().item(), 1e-2)
        assert worst <= 20 * limit, f"{name}: {key} is off by {worst:.2e}, allowed {20 * limit:.2e}"


def check(name: str, sizes: Sizes, make: Callable, keys: dict, rtol: float = 1e-5) -> None:
    expected = train(make(), keys)
    model = make()
    parallel = Parallel(model, start(sizes, "cpu", timeout=60), config(**keys).torch_dtype)
    compare(name, train(model, keys, parallel), expected, rtol)


def _main(rank: int, world: int, port: int, work: Callable) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    work()
    torch.distributed.destroy_process_group()


def processes(world: int, work: Callable) -> None:
    """Run `work()` in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_main, (world, port, work), nprocs=world)
