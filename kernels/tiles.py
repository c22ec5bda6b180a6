"""The configuration table, tiles.csv: each kernel's tile by GPU, bytes of an element and class of shape.

A row for the GPU at hand comes before one for "any".  `source` says how a row was found: "compiled" ones
have been compiled for every GPU of `python -m benchmarks.aot` that they are for, and none of them spills a
register or asks for more shared memory than a block may have; "measured" ones were the fastest on that GPU.
`python -m benchmarks.tune` makes rows.  Nothing is tuned when a kernel is called, so that the first call's
result equals every later one.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .launch import architecture

PATH = Path(__file__).with_name("tiles.csv")
KEY = ("kernel", "gpu", "bytes", "class")

Key = tuple[str, str, int, str]


class Tile(NamedTuple):
    """One program's share of a matrix product, and how it is run.

    Attributes:
        rows, cols: of the result; for attention queries and keys.
        depth: of the inner dimension in one step; 0 where a kernel takes all of it.
        warps, stages: warps of a program, and steps of its loads that are on their way together.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def load() -> dict[Key, Tile]:
    """The table as it is in the file."""
    with PATH.open() as file:
        return {key(row): Tile(*(int(row[name]) for name in Tile._fields)) for row in csv.DictReader(file)}


def key(row: dict[str, str]) -> Key:
    return row["kernel"], row["gpu"], int(row["bytes"]), row["class"]


TABLE = load()


def find(kernel: str, x: Tensor, kind: object) -> Tile | None:
    """The tile of a kernel for elements as those of x, on its GPU."""
    for gpu in (architecture(x), "any"):
        tile = TABLE.get((kernel, gpu, x.element_size(), str(kind)))
        if tile:
            return tile
    return None
