"""A trainer as nanoGPT writes it, in plain PyTorch: what `benchmarks.pretrain` holds `llmkern train` against.

It does what nanoGPT's train.py does on a CPU, with its settings: batches cut from a memory map and stacked,
AdamW without `fused`, clipping as a step of its own, `loss.item()` each step, both splits estimated every
`eval_every` steps, and a checkpoint whenever the loss on held-out text is the best so far.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmkern.models import GPT
from llmkern.text import Batches
from llmkern.train import RunConfig


class NanoGPT:
    """The trainer.

    Args:
        config: the keys of `llmkern train`.
        model: of PyTorch's modules alone.
        data: folder with train-00000.bin and val-00000.bin.
        starts: "train" and "val" -> gives the windows of a step, so that both trainers see the same ones.
        out: folder of the checkpoint.
    """

    def __init__(
        self, config: RunConfig, model: GPT, data: Path, starts: dict[str, Batches], out: Path
    ) -> None:
        self.config, self.model, self.data, self.starts, self.out = config, model, data, starts, out
        decay = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        out.mkdir(parents=True, exist_ok=True)

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of steps done after each."""
        best = math.inf
        for step in range(self.config.steps + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            if step % self.config.eval_every == 0:
                loss = self._estimate()["val"]
                self.validations.append((step, loss))
                if loss < best and step > 0:
                    best = loss
                    self._save(step, best)
            if step == self.config.steps:
                return
            inputs, targets = self._batch("train", step)
            _, loss = self.model(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
            yield step + 1

    def _rate(self, step: int) -> float:
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        ratio = (step - c.warmup_steps) / (c.steps - c.warmup_steps)
        scale = 0.5 * (1.0 + math.cos(math.pi * ratio))
        return c.min_learning_rate + scale * (c.learning_rate - c.min_learning_rate)

    def _batch(self, split: str, step: int) -> tuple[Tensor, Tensor]:
        tokens = np.memmap(self.data / f"{split}-00000.bin", dtype=np.uint16, mode="r")
        starts = self.starts[split].starts(step)
        block = self.config.block_size
        x = torch.stack([torch.from_numpy(tokens[i : i + block].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
        return x, y

    @torch.no_grad()
    def _estimate(self) -> dict[str, float]:
        self.model.eval()
        result = {}
        for split in ("train", "val"):
            batches = (self._batch(split, i) for i in range(self.config.eval_batches))
            losses = [self.model(*batch)[1].item() for batch in batches]
            result[split] = sum(losses) / len(losses)
        self.model.train()
        return result

    def _save(self, step: int, best: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": asdict(self.model.config),
            "iter_num": step,
            "best_val_loss": best,
        }
        torch.save(state, self.out / "ckpt.pt")
