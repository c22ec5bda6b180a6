"""What a process sends, and what it holds at most, is what `llmkern plan` says of the same training."""

import exact
import pytest
import torch

from llmkern.models import GPT, GPTConfig
from llmkern.parallel import Parallel, Sizes, start
from llmkern.plan import config, hardware, memory, step
from llmkern.plan.strategy import RECIPES, Strategy
from llmkern.train import TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SIZES = {"vocab_size": 512, "block_size": 64, "n_head": 4, "n_embd": 128}
ROWS = 4  # of all processes together
TWO = {
    "DDP": (Sizes(dp=2), {"dp": 2}),
    "FSDP": (Sizes(fsdp=2), {"dp": 2, "zero": 3}),
    "TP": (Sizes(tp=2), {"tp": 2, "sp": True}),
    "CP": (Sizes(cp=2), {"cp": 2}),
    "PP": (Sizes(pp=2), {"pp": 2}),
}
FOUR = {
    "TP of 4": (Sizes(tp=4), {"tp": 4, "sp": True}),
    "FSDP and TP": (Sizes(fsdp=2, tp=2), {"dp": 2, "zero": 3, "tp": 2, "sp": True}),
}
# of the planned exchanges those that are all-reduces; all others gather, scatter or send
FEW = 256  # bytes of losses, counts and norms of a step: numbers, one each
REDUCED = ("DP gradients", "TP loss", "TP gradients", "PP embedding")


class Batches:
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __getitem__(self, step: int):
        tokens = torch.randint(SIZES["vocab_size"], (self.rows, SIZES["block_size"] + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make(sizes: Sizes, layers: int) -> tuple[GPT, Trainer]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=layers, **SIZES))
    parallel = Parallel(model, start(sizes, "cpu", timeout=120))
    batches = Batches(ROWS // sizes.data)
    trainer = Trainer(model, batches, TrainConfig(steps=9), parallel=parallel)
    trainer.advance()  # the first exchanges more: DDP looks at its buckets
    return model, trainer


def planned(way: dict) -> dict[str, float]:
    """Bytes of a step: all-reduces, and all else."""
    model = config.find(GPTConfig(n_layer=4, **SIZES))
    micro = 1 if "pp" in way else ROWS // way.get("dp", 1)
    strategy = Strategy(micro_batch=micro, **way)
    found = step.predict(
        model, hardware.find("h100"), strategy, RECIPES["float32"], ROWS, SIZES["block_size"], "float32"
    )
    reduced = sum(found.volume.get(name, 0.0) for name in REDUCED)
    return {"all_reduce": reduced, "other": sum(found.volume.values()) - reduced}


def sent(sizes: Sizes) -> dict[str, float]:
    """The same, counted at the process group."""
    from llmkern.parallel.traffic import Traffic

    _, trainer = make(sizes, 4)
    with Traffic() as traffic:
        trainer.advance()
    print(sizes, traffic.calls, traffic.sent)
    # what a process gets counts in a pipeline: planned is a stage between two others, which sends as much
    other = sum(n for kind, n in traffic.sent.items() if kind != "all_reduce")
    if sizes.pp == 1:
        other -= traffic.sent.get("recv", 0.0)
    return {"all_reduce": traffic.sent["all_reduce"], "other": other}


def traffic(ways: dict) -> None:
    for name, (sizes, way) in ways.items():
        got, expected = sent(sizes), planned(way)
        for kind, size in expected.items():
            allowed = 0.01 * size + FEW
            assert abs(got[kind] - size) < allowed, f"{name}: {kind} {got[kind]:,.0f}, planned {size:,.0f}"


def peak() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    model, trainer = make(Sizes(fsdp=2), 6)
    trainer.optimizer.zero_grad = lambda **options: None  # planned are gradients that are there, and added to
    trainer.advance()
    tracker = MemTracker()
    tracker.track_external(model, trainer.optimizer)
    with tracker:
        trainer.advance()
    got = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    strategy = Strategy(dp=2, zero=3, micro_batch=ROWS // 2, fused_ffn=True, loss="fused")
    found = memory.training(
        config.find(GPTConfig(n_layer=6, **SIZES)), strategy, RECIPES["float32"], ROWS, SIZES["block_size"], 4
    )
    print(got, found.total)
    assert abs(got["Total"] / found.total - 1) < 0.1, f"holds {got}, planned {found.parts}"


def both() -> None:
    traffic(TWO)
    peak()


def test_what_is_sent_and_held_is_what_was_planned():
    exact.processes(2, both)


@pytest.mark.slow
def test_what_four_send_is_what_was_planned():
    exact.processes(4, traffic, FOUR)
