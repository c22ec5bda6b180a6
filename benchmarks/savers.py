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

import torch
import torch.multiprocessing as mp

from llmkern.machine import describe
from llmkern.models import GPT, GPTConfig
from llmkern.parallel import Parallel, Sizes, start
from llmkern.parallel.outer import OuterSteps
from llmkern.parallel.traffic import Traffic
from llmkern.text.batches import Batches
from llmkern.train import TrainConfig, Trainer

ROOT = Path(__file__).parent.parent
STEPS, ROWS, BLOCK = 300, 8, 64
WAYS = {"DDP": {}, "bf16": {"saver": "bf16"}, "PowerSGD, rank 4": {"saver": "powersgd"}}
WAYS |= {f"DiLoCo, every {every}": {"every": every} for every in (10, 50)}
WAYS |= {"local SGD, every 10": {"every": 10, "learning_rate": 1.0, "momentum": 0.0}}


def tokens() -> tuple[torch.Tensor, int]:
    """All docs as characters, and how many different ones there are."""
    text = "".join(
        path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if ".zh" not in path.name
    )
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([letters[c] for c in text]), len(letters)


def train(way: dict, text: torch.Tensor, vocab: int) -> tuple[list[float], float]:
    """Losses, means of both replicas, and bytes that each sends in a step."""
    torch.manual_seed(0)
    model, rank = GPT(GPTConfig(vocab, BLOCK, n_layer=2, n_head=4, n_embd=64)), torch.distributed.get_rank()
    config = TrainConfig(steps=STEPS, warmup_steps=20)
    batches = Batches(text, ROWS // 2, BLOCK, order="random", rank=rank, world=2)
    outer = parallel = None
    if "every" in way:
        outer = OuterSteps(model.parameters(), **way)
    else:
        parallel = Parallel(model, start(Sizes(dp=2), "cpu"), **way)
    trainer, losses = Trainer(model, batches, config, parallel=parallel), []
    with Traffic() as traffic:
        for record in trainer:
            if outer is not None:
                outer.step()
            losses.append(record.loss)
    both = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(both)
    return (both / 2).tolist(), sum(traffic.sent.values()) / STEPS


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    start(Sizes(dp=2), "cpu")
    text, vocab = tokens()
    found = {name: train(way, text, vocab) for name, way in WAYS.items()}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def plot(ways: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, way in ways.items():
        smooth = [sum(way["losses"][max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(STEPS)]
        axes.plot(smooth, label=f"{name}, {way['bytes_a_step']:,.0f} bytes a step", linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats), mean of the last 10 steps")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        mp.spawn(work, (port, str(out)), nprocs=2)
        found = json.loads(out.read_text())
    ways = {
        name: {"losses": losses, "end": sum(losses[-30:]) / 30, "bytes_a_step": sent}
        for name, (losses, sent) in found.items()
    }
    for name, way in ways.items():
        print(f"{name:<22} loss {way['end']:.4f} (last 30 steps), {way['bytes_a_step']:>10,.0f} bytes a step")
    result = {"machine": describe("cpu"), "steps": STEPS, "ways": ways}
    path = ROOT / "benchmarks" / "results" / f"savers-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(ways, ROOT / "docs" / "figures" / "savers.png")


if __name__ == "__main__":
    main()
