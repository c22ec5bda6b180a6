"""benchmarks/results/aot.csv: what each kernel's default configuration takes on each GPU.

Committed, so that a review shows a kernel that grew; `regressions` names it in a test.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from .aot_compile import Compiled

PATH = Path(__file__).parent / "results/aot.csv"
KEY = ("target", "dtype", "op", "kernel")
FACTS = ("warps", "registers", "shared", "instructions", "tensor", "wide")
INSTRUCTIONS = 1.05  # times as many are not worth a word
REGISTERS = 8  # a GPU shares them out in eights
WIDE = 0.05  # of the bytes

Key = tuple[str, ...]


def key(row: Compiled) -> Key:
    return row.target, row.dtype, row.op, row.kernel


def version() -> str:
    """Of the compiler: facts of another one do not compare."""
    import triton

    return triton.__version__


def facts(row: Compiled) -> dict[str, str]:
    code = row.code
    values = (row.warps, code.registers, row.shared, code.instructions, code.tensor, f"{code.wide:.2f}")
    return dict(zip(FACTS, map(str, values)))


def load() -> dict[Key, dict[str, str]]:
    """The table, empty if it was made by another Triton."""
    if not PATH.exists():
        return {}
    with PATH.open() as file:
        rows = list(csv.DictReader(file))
    return {tuple(r[k] for k in KEY): r for r in rows if r["triton"] == version()}


def save(rows: list[Compiled]) -> None:
    """Renew the rows of these kernels; rows of another Triton, and of kernels that are gone, go."""
    compiled = {key(row)[:3] for row in rows}  # targets, dtypes and ops that were compiled whole
    table = {k: v for k, v in load().items() if k[:3] not in compiled}
    table |= {key(row): facts(row) for row in rows}
    PATH.parent.mkdir(parents=True, exist_ok=True)
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*KEY, *FACTS, "triton"))
        for k, v in sorted(table.items()):
            writer.writerow((*k, *(v[name] for name in FACTS), version()))


def regressions(row: Compiled, table: dict[Key, dict[str, str]]) -> Iterator[str]:
    """What the kernel takes more of than the table says; of a first launch of a kernel alone."""
    before, now = table.get(key(row)), facts(row)
    if before is None or not row.first:
        return
    if int(now["registers"]) > int(before["registers"]) + REGISTERS:
        yield f"{now['registers']} registers, the table has {before['registers']}"
    if int(now["shared"]) > int(before["shared"]):
        yield f"{now['shared']} bytes of shared memory, the table has {before['shared']}"
    if int(now["instructions"]) > int(before["instructions"]) * INSTRUCTIONS:
        yield f"{now['instructions']} instructions, the table has {before['instructions']}"
    if before["tensor"] != now["tensor"]:
        yield f"{now['tensor'] or 'no tensor core'}, the table has {before['tensor'] or 'none'}"
    if float(now["wide"]) < float(before["wide"]) - WIDE:
        yield f"{now['wide']} of the bytes in wide accesses, the table has {before['wide']}"
