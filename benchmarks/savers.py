"""Loss curves of training with fewer bytes between replicas: what each option saves, and what it costs.

    python -m benchmarks.savers              # a few minutes on 2 cores

Two processes train a small GPT on this repository's docs, as characters, once each way; the result is written
to benchmarks/results/savers-DATE.json and docs/figures/savers.png.
"""

import datetime
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.multiprocessing as mp

from llmkern.machine import describe
from llmkern.models import GPT, GPTConfig
from llmkern.parallel import Parallel, Sizes, start
from llmkern.parallel.outer import Outer
from llmkern.parallel.traffic import Traffic
from llmkern.text.batches import Batches, split
from llmkern.train import TrainConfig, Trainer
from llmkern.train.loop import evaluate

ROOT = Path(__file__).parent.parent
STEPS, ROWS, BLOCK = 600, 8, 64
EVERY, HELD_OUT = 50, 20  # steps between looks at held-out text, all outer steps; batches of each
WAYS = {"DDP": {}, "bf16": {"saver": "bf16"}, "PowerSGD, rank 4": {"saver": "powersgd"}}
WAYS |= {f"DiLoCo, every {every}": {"outer": Outer(every)} for every in (10, 50)}
WAYS |= {"local SGD, every 10": {"outer": Outer(10, learning_rate=1.0, momentum=0.0)}}


class Course(NamedTuple):
    """What a training went through; losses are means of both replicas, in nats a character."""

    losses: list[float]  # of each step's batch, each replica with its own weights
    held_out: dict[int, float]  # steps done -> loss on held-out text, with weights that are the same on both
    bytes_a_step: float  # that each replica sends


def tokens() -> tuple[torch.Tensor, int]:
    """All docs as characters, and how many different ones there are."""
    text = "".join(
        path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if ".zh" not in path.name
    )
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([letters[c] for c in text]), len(letters)


def train(way: dict, text: torch.Tensor, vocab: int) -> Course:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab, BLOCK, n_layer=2, n_head=4, n_embd=64))
    config = TrainConfig(steps=STEPS, warmup_steps=20)
    parallel = Parallel(model, start(Sizes(dp=2), "cpu"), **way)
    rank = parallel.data_rank
    learnt, held_out = (Batches(part, ROWS // 2, BLOCK, rank=rank, world=2) for part in split(text))
    trainer, losses, found, sent = Trainer(model, learnt, config, parallel=parallel), [], {}, 0.0
    while trainer.step < STEPS:
        with Traffic() as traffic:
            losses.append(trainer.advance().loss)
        sent += sum(traffic.sent.values())
        if trainer.step % EVERY == 0:
            found[trainer.step] = evaluate(parallel, held_out, HELD_OUT)
    return Course(losses, found, sent / STEPS)


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    start(Sizes(dp=2), "cpu")
    text, vocab = tokens()
    found = {}
    for name, way in WAYS.items():
        course = train(way, text, vocab)
        found[name] = course._asdict()
        if rank == 0:
            end, sent = course.held_out[STEPS], course.bytes_a_step
            print(f"{name:<22} {end:.4f} on held-out text, {sent:>10,.0f} bytes a step", flush=True)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def plot(ways: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, way in ways.items():
        smooth = [sum(way["losses"][max(0, i - 19) : i + 1]) / min(i + 1, 20) for i in range(STEPS)]
        left.plot(smooth, linewidth=1)
        label = f"{name}, {way['bytes_a_step'] / 1e3:,.1f} kB a step"
        right.plot([*map(int, way["held_out"])], [*way["held_out"].values()], "o-", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss (nats) of a replica, mean of the last 20 steps")
    right.set(xlabel="step", ylabel="loss (nats) on held-out text, of what they agreed on")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        mp.spawn(work, (port, str(out)), nprocs=2)
        ways = json.loads(out.read_text())
    result = {"machine": describe("cpu"), "steps": STEPS, "ways": ways}
    path = ROOT / "benchmarks" / "results" / f"savers-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(ways, ROOT / "docs" / "figures" / "savers.png")


if __name__ == "__main__":
    main()
