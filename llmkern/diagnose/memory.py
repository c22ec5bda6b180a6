"""Where memory is: every block of it with its size, its part and its life."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

PARTS = (
    "weights", "gradients", "optimizer", "KV cache", "inputs", "activations", "logits", "temporary",
    "scratch",
)  # fmt: skip


@dataclass
class Block:
    """One storage.

    Attributes:
        size: bytes.
        part: one of PARTS.
        shape: of the tensor that it was made for.
        born, died: numbers of the calls between which it lives; died is None while it does.
    """

    size: int
    part: str
    shape: tuple[int, ...]
    born: int
    died: int | None = None


class Ledger:
    """Follows storages from when they are first seen until they are freed.

    What an op allocates and frees within itself is not seen, except what `keep_scratch` is told.
    """

    def __init__(self) -> None:
        self.now = 0  # number of the call that runs
        self.blocks: list[Block] = []
        self.known = WeakIdKeyDictionary()  # storage -> its block

    def add(self, values: Any, part: str) -> list[int]:
        """Count the storages of the tensors among `values`, those that are new, as `part`; their sizes."""
        sizes = []
        for t in _tensors(values):
            storage = t.untyped_storage()
            if storage in self.known or not storage.nbytes():
                continue
            block = Block(storage.nbytes(), part, tuple(t.shape), self.now)
            self.known[storage] = block
            self.blocks.append(block)
            weakref.finalize(storage, self._free, block)
            sizes.append(block.size)
        return sizes

    def move(self, values: Any, part: str) -> None:
        """Say that the blocks of these tensors belong to `part`."""
        for t in _tensors(values):
            block = self.known.get(t.untyped_storage())
            if block is None:
                self.add(t, part)
            else:
                block.part = part

    def has_all(self, values: Any) -> bool:
        """Whether every tensor among `values` lives in a known block: then it is a view."""
        return all(t.untyped_storage() in self.known for t in _tensors(values))

    def call_it_logits(self, logits: torch.Size | None) -> None:
        """Blocks of as many rows of the vocabulary as `logits`: themselves, their gradient, their log."""
        if logits is None or len(logits) < 2:
            return
        for block in self.blocks:
            width = block.shape[-1] if block.shape else 0
            elements = torch.Size(block.shape).numel()
            if (width, elements) == (logits[-1], logits.numel()) and block.part in (
                "activations", "temporary",
            ):  # fmt: skip
                block.part = "logits"

    def keep_scratch(self, size: int) -> None:
        """Count what the op with the most scratch leaves with its threads, from the first step on."""
        if size:
            self.blocks.append(Block(size, "scratch", (size,), 0))

    def _free(self, block: Block) -> None:
        block.died = self.now

    def timeline(self) -> list[dict[str, int]]:
        """Bytes by part during each call, from the first to the last."""
        changes: list[dict[str, int]] = [{} for _ in range(self.now + 2)]
        for block in self.blocks:
            last = self.now + 1 if block.died is None else block.died + 1
            for when, size in ((block.born, block.size), (last, -block.size)):
                if when <= self.now:
                    changes[when][block.part] = changes[when].get(block.part, 0) + size
        level, result = dict.fromkeys(PARTS, 0), []
        for change in changes[: self.now + 1]:
            for part, size in change.items():
                level[part] += size
            result.append(dict(level))
        return result


def peak(timeline: Iterable[dict[str, int]]) -> tuple[int, dict[str, int]]:
    """(number of the call, bytes by part) where the sum is largest; the first such call."""
    return max(enumerate(timeline), key=lambda item: sum(item[1].values()))


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]
