"""Training on Shakespeare, swapped against the same model in plain PyTorch, in float32.

Both see the same batches from the same weights.  Rounding differs, so the losses part in the end; how late
and how far is the figure.
"""

import multiprocessing
from itertools import islice
from typing import NamedTuple

import torch

import llmkern
from llmkern.models import GPT, GPTConfig
from llmkern.text import Batches, CharTokenizer, split
from llmkern.train import TrainConfig, Trainer, evaluate

SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}  # nanoGPT's recipe for CPUs
EARLY = 50  # steps up to which losses must agree
LARGEST, FINAL = 1e-4, 0.01


class Course(NamedTuple):
    """One training.

    Attributes:
        early: losses up to step `EARLY`.
        last: the validation loss at the end.
    """

    early: list[float]
    last: float


class Pair(NamedTuple):
    """Of one seed, or of a control."""

    seed: int
    plain: Course
    swapped: Course

    @property
    def early(self) -> float:
        """The largest difference of the losses up to step `EARLY`."""
        return max(abs(a - b) for a, b in zip(self.plain.early, self.swapped.early, strict=True))

    @property
    def final(self) -> float:
        """The relative difference of the last losses."""
        return self.swapped.last / self.plain.last - 1

    @property
    def good(self) -> bool:
        return self.early <= LARGEST and abs(self.final) <= FINAL


def train(text: str, seed: int, steps: int, swap: bool, spoil: float | None = None) -> Course:
    """Train on `text`; with `spoil`, which is added to a weight as a control, only up to `EARLY`."""
    tokenizer = CharTokenizer(text)
    tokens, held_out = split(tokenizer.encode(text))
    shape = GPTConfig(len(tokenizer), **SHAPE)
    torch.manual_seed(seed)
    model = GPT(shape, kernels=False)
    if swap:
        llmkern.swap_(model)
    if spoil is not None:
        with torch.no_grad():
            model.transformer.wte.weight.view(-1)[0] += spoil
    make = llmkern.optim.AdamW if swap else torch.optim.AdamW
    trainer = Trainer(
        model, Batches(tokens, 12, shape.block_size, seed),
        TrainConfig(steps, learning_rate=1e-3, warmup_steps=20),
        make(model.parameters(), 1e-3, betas=(0.9, 0.95)),
    )  # fmt: skip
    records = islice(trainer, None if spoil is None else EARLY)
    early = [record.loss for record in records if record.step < EARLY]
    return Course(early, evaluate(model, Batches(held_out, 12, shape.block_size, 0), 20))


def train_all(text: str, seeds: tuple[int, ...], steps: int) -> tuple[list[Pair], Pair]:
    """A pair for each seed, and the control, shared out over two processes of one thread."""
    jobs = [(text, seed, steps, swap) for swap in (False, True) for seed in seeds]
    with multiprocessing.get_context("fork").Pool(
        2, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        *courses, spoiled = pool.starmap(train, [*jobs, (text, seeds[0], steps, True, 1.0)], chunksize=1)
    plain, swapped = courses[: len(seeds)], courses[len(seeds) :]
    return [Pair(*each) for each in zip(seeds, plain, swapped)], Pair(seeds[0], plain[0], spoiled)
