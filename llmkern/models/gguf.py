"""Reads GGUF, the container of llama.cpp: metadata, and tensors as torch's or as weights in 8 or 4 bits.

    file = GGUF("model.gguf")
    file.metadata["general.architecture"]
    weight = file.tensor("blk.0.attn_q.weight")  # a Tensor, or a QuantWeight for nn.QuantLinear

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: "GGUF", version,
numbers of tensors and of metadata; metadata; name, dimensions, type and offset of each tensor; the data,
at a multiple of `general.alignment`.  Nothing a file says is believed before it is held against its size.
"""

import math
import mmap
import struct
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.quant_weight import BLOCK, QuantWeight

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DENSE = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
QUANTISED = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}  # and the bytes of a block of 32
MOST_DIMENSIONS = 4
MOST_NESTING = 8  # of arrays in arrays


class GGUFError(UserError):
    """The file is no GGUF, or a broken one, or has what this reader does not know."""


class TensorInfo(NamedTuple):
    """What a file tells of one tensor.

    Attributes:
        shape: outermost dimension first, as torch has it.
        kind: GGML's number of its type.
        offset: of its first byte in the file; 0 as long as it is not known.
        nbytes: its size; None for a type that this reader does not know.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int | None


class GGUF:
    """A GGUF file, mapped into memory; tensors are read when they are asked for.

    Args:
        path: of the file.

    Attributes:
        metadata: key -> number, string, or list of these.
        tensors: name -> TensorInfo.

    Raises:
        GGUFError: what is wrong with the file.
    """

    def __init__(self, path: str | PathLike) -> None:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise GGUFError(f"GGUF: the file has {size} bytes, expected a header of 24")
            # tensors on it may be written to; the file stays as it is
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        reader = _Reader(self._memory)
        if self._memory[:4] != b"GGUF":
            raise GGUFError(f"GGUF: the file begins with {self._memory[:4]!r}, expected b'GGUF'")
        reader.at = 4
        version = reader.number("I", "the version")
        if version not in (2, 3):
            raise GGUFError(f"GGUF: the version is {version}, expected 2 or 3 in little-endian order")
        tensors = reader.count("the number of tensors", least=24)
        entries = reader.count("the number of metadata entries", least=13)
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = reader.string("a metadata key")
            self.metadata[key] = reader.value(reader.number("I", f"the type of {key!r}"), key)
        infos = dict(reader.tensor() for _ in range(tensors))
        if len(infos) < tensors:
            raise GGUFError(f"GGUF: {tensors} tensors have {len(infos)} names, expected a name for each")
        self.tensors = {name: self._placed(name, info, reader.at) for name, info in infos.items()}

    def tensor(self, name: str) -> Tensor | QuantWeight:
        """One tensor: F32, F16 and BF16 share memory with the file's pages, the others are taken apart.

        Q8_0, Q4_0 and Q4_1 lose no bit: codes and float16 scales are the file's.

        Raises:
            KeyError: no such tensor.
            GGUFError: a type that this reader does not know.
        """
        shape, kind, offset, nbytes = self.tensors[name]
        if nbytes is None:
            known = ", ".join(label for label, _ in (*DENSE.values(), *QUANTISED.values()))
            raise GGUFError(f"GGUF: tensor {name!r} is of type {kind}, expected one of {known}")
        if kind in DENSE:
            dtype = DENSE[kind][1]
            if not nbytes:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=offset).view(
                shape
            )
        if len(shape) != 2 or not nbytes:
            raise GGUFError(
                f"GGUF: tensor {name!r} is {QUANTISED[kind][0]} of shape {shape}, expected a matrix"
            )
        block = QUANTISED[kind][1]
        data = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=offset)
        return from_blocks(data.view(shape[0], shape[1] // BLOCK, block))

    def _placed(self, name: str, info: TensorInfo, end: int) -> TensorInfo:
        """The tensor's place in the file, if it is in it."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise GGUFError(f"GGUF: general.alignment is {alignment!r}, expected a multiple of 8")
        start = -(-end // alignment) * alignment + info.offset
        if info.offset % alignment or start + (info.nbytes or 0) > len(self._memory):
            raise GGUFError(
                f"GGUF: tensor {name!r} has {info.nbytes} bytes from {start} on, expected a multiple of "
                f"{alignment} inside the file of {len(self._memory)}"
            )
        return info._replace(offset=start)


def from_blocks(blocks: Tensor) -> QuantWeight:
    """Blocks as GGUF has them, (D_out, D / 32, bytes of a block) uint8, told apart by their size.

    34 bytes: d, 32 codes of 8 bits; 18: d, 16 bytes of codes; 20: d, m, 16 bytes of codes; d and m float16.
    """
    size = blocks.shape[2]
    if size not in (18, 20, 34):
        raise ValueError(f"from_blocks: a block has {size} bytes, expected 34, 18 or 20")
    first = 4 if size == 20 else 2
    halves = blocks[:, :, :first].contiguous().view(torch.float16)  # (D_out, D / 32, 1 or 2)
    codes = blocks[:, :, first:].flatten(1)
    mins = halves[:, :, 1].contiguous() if size == 20 else None
    return QuantWeight(codes.view(torch.int8) if size == 34 else codes, halves[:, :, 0].contiguous(), mins)


class _Reader:
    """Reads on from `at`, and says what it was looking for when the file ends before."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.at = memory, 0

    def take(self, size: int, what: str) -> int:
        """Where the next `size` bytes begin; moves behind them."""
        if size > len(self.memory) - self.at:
            left = len(self.memory) - self.at
            raise GGUFError(f"GGUF: {what} needs {size} bytes at {self.at}, but the file has {left} more")
        self.at += size
        return self.at - size

    def number(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.memory, start)[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that have `least` bytes each in the rest of the file."""
        n = self.number("Q", what)
        if n * least > len(self.memory) - self.at:
            raise GGUFError(f"GGUF: {what} is {n}, more than the file's {len(self.memory)} bytes can hold")
        return n

    def string(self, what: str) -> str:
        length = self.count(f"the length of {what}", least=1)
        start = self.take(length, what)
        try:
            return self.memory[start : start + length].decode()
        except UnicodeDecodeError:
            raise GGUFError(f"GGUF: {what} at {start} is not UTF-8") from None

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        what = f"the value of {key!r}"
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY or nesting == MOST_NESTING:
            raise GGUFError(f"GGUF: {what} is of type {kind} at depth {nesting}, expected type 0 to 12")
        kind = self.number("I", f"the type of elements of {key!r}")
        size = struct.calcsize("<" + NUMBERS[kind]) if kind in NUMBERS else 8
        n = self.count(f"the length of {key!r}", least=size)
        if kind in NUMBERS:
            return list(struct.unpack_from(f"<{n}{NUMBERS[kind]}", self.memory, self.take(n * size, what)))
        return [self.value(kind, key, nesting + 1) for _ in range(n)]

    def tensor(self) -> tuple[str, TensorInfo]:
        name = self.string("a tensor's name")
        dims = self.number("I", f"the number of dimensions of {name!r}")
        if dims > MOST_DIMENSIONS:
            raise GGUFError(
                f"GGUF: tensor {name!r} has {dims} dimensions, expected at most {MOST_DIMENSIONS}"
            )
        shape = tuple(self.number("Q", f"the shape of {name!r}") for _ in range(dims))[::-1]
        if max(shape, default=0) >= 2**63:
            raise GGUFError(f"GGUF: tensor {name!r} has shape {shape}, expected dimensions below 2**63")
        kind, offset = self.number("I", f"the type of {name!r}"), self.number("Q", f"the offset of {name!r}")
        nbytes = None
        if kind in DENSE:
            nbytes = math.prod(shape) * DENSE[kind][1].itemsize
        elif kind in QUANTISED:
            if not shape or shape[-1] % BLOCK:
                what = f"tensor {name!r} is {QUANTISED[kind][0]} of shape {shape}"
                raise GGUFError(f"GGUF: {what}, expected rows of a multiple of {BLOCK}")
            nbytes = math.prod(shape) // BLOCK * QUANTISED[kind][1]
        return name, TensorInfo(shape, kind, offset, nbytes)
