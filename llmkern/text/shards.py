"""Tokens on disk: written in shards, read through memory maps.

DATA/
    train-00000.bin, ...   tokens, uint16 or uint32, little endian; documents end with end of text
    val-00000.bin, ...
    tokenizer.json
    manifest.json          counts, sources, options, and size and sha256 of each file
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .. import durable
from ..errors import UserError
from .tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
SHARD_TOKENS = 2**27  # 256 MiB of uint16


class ShardWriter:
    """Writes the tokens of one split into shards of a new folder.

    Args:
        folder: where to.
        split: "train" or "val".
        dtype: of the tokens, little endian.
    """

    def __init__(self, folder: durable.NewFolder, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards: list[int] = []  # tokens in each
        self.stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.shards or self.shards[-1] == SHARD_TOKENS:
                self.stack.close()
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self.file = self.stack.enter_context(self.folder.file(name))
                self.shards.append(0)
            piece = tokens[: SHARD_TOKENS - self.shards[-1]]
            self.file.write(np.ascontiguousarray(piece, self.dtype))
            self.shards[-1] += len(piece)
            tokens = tokens[len(piece) :]


class Tokens:
    """The tokens of a split: one long sequence over several arrays.

    Args:
        shards: (n,) integer arrays, memory-mapped or not.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.ends = list(accumulate(map(len, self.shards)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(n,) starts to (n, length) int64: the tokens from each start on."""
        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, starts.tolist()):
            self._read(row, start)
        return out

    def _read(self, row: np.ndarray, start: int) -> None:
        shard = bisect_right(self.ends, start)
        begin = start - (self.ends[shard - 1] if shard else 0)
        piece = self.shards[shard][begin : begin + len(row)]
        row[: len(piece)] = piece
        if len(piece) < len(row):  # the window goes on in the next shard
            self._read(row[len(piece) :], start + len(piece))


class Data:
    """A folder that `llmkern data prepare` made.

    Args:
        path: the folder.
        check: compare every byte with its checksum; otherwise only the sizes.

    Attributes:
        manifest: counts, sources and options.
        sha256: of the manifest, and so of everything.
        tokenizer: what made the tokens.

    Raises:
        UserError: it is not such a folder, or damaged.
    """

    def __init__(self, path: str | os.PathLike, check: bool = True) -> None:
        self.path = Path(path)
        try:
            self.manifest = durable.read_manifest(self.path)
            self.splits = self.manifest["splits"]
            self._check_sizes()
            if check:
                durable.verify(self.path)
        except (durable.Damaged, KeyError) as error:
            known = (self.path / durable.MANIFEST).exists()
            state = f"is damaged: {error}" if known else "is no folder of prepared data"
            raise UserError(f"data {str(path)!r} {state}; make it with `llmkern data prepare`") from None
        self.sha256 = durable.sha256(self.path / durable.MANIFEST)
        self.tokenizer: Tokenizer = load_tokenizer(self.path)

    def _check_sizes(self) -> None:
        for name, about in self.manifest["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.exists() else 0
            if size != about["bytes"]:
                raise durable.Damaged(f"{name} has {size:,} bytes, expected {about['bytes']:,}")

    def tokens(self, split: str) -> Tokens:
        """The tokens of "train" or "val", memory-mapped."""
        dtype = np.dtype(self.manifest["dtype"])
        names = sorted(name for name in self.manifest["files"] if name.startswith(f"{split}-"))
        return Tokens([np.memmap(self.path / name, dtype, mode="r") for name in names])
