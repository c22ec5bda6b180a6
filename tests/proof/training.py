"""Training on Shakespeare, swapped against the same model in plain PyTorch, in float32.

Both see the same batches from the same weights.  Rounding differs, so the losses part in the end; how late
and how far is the figure.
"""

import multiprocessing
from typing import NamedTuple

import torch

import llmkern
from llmkern.models import GPT, GPTConfig
from llmkern.text import Batches, CharTokenizer, split
from llmkern.train import TrainConfig, Trainer, evaluate

SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}  # nanoGPT's recipe for CPUs
EARLY = 50  # steps up to which losses must agree
LARGEST, FINAL = 1e-4, 0.01


class Pair(NamedTuple):
    """One seed.

    Attributes:
        early: largest difference of the losses up to step `EARLY`.
        plain, swapped: validation losses at the end.
    """

    seed: int
    early: float
    plain: float
    swapped: float

    @property
    def good(self) -> bool:
        return self.early <= LARGEST and abs(self.swapped / self.plain - 1) <= FINAL


def train(text: str, seed: int, steps: int, spoil: float = 0.0) -> Pair:
    """Train both on `text` for `steps`; `spoil` is added to a weight of the swapped one, as a control."""
    tokenizer = CharTokenizer(text)
    tokens, held_out = split(tokenizer.encode(text))
    shape = GPTConfig(len(tokenizer), **SHAPE)
    torch.manual_seed(seed)
    plain = GPT(shape, kernels=False)
    swapped = GPT(shape, kernels=False)
    swapped.load_state_dict(plain.state_dict())
    llmkern.swap_(swapped)
    with torch.no_grad():
        swapped.transformer.wte.weight.view(-1)[0] += spoil
    config = TrainConfig(steps, learning_rate=1e-3, warmup_steps=20)
    batches = Batches(tokens, 12, shape.block_size, seed)
    made = torch.optim.AdamW(plain.parameters(), 1e-3, betas=(0.9, 0.95))
    ours = llmkern.optim.AdamW(swapped.parameters(), 1e-3, betas=(0.9, 0.95))
    trainers = Trainer(plain, batches, config, made), Trainer(swapped, batches, config, ours)
    early = 0.0
    for a, b in zip(*trainers):
        if a.step < EARLY:
            early = max(early, abs(a.loss - b.loss))
    checks = Batches(held_out, 12, shape.block_size, 0)
    return Pair(seed, early, evaluate(plain, checks, 20), evaluate(swapped, checks, 20))


def train_all(jobs: list[tuple]) -> list[Pair]:
    """`train` with each of these arguments, shared out over two processes of one thread."""
    with multiprocessing.get_context("fork").Pool(
        2, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return pool.starmap(train, jobs, chunksize=1)
