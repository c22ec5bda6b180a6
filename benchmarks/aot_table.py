"""benchmarks/results/aot.csv: what each kernel's default configuration takes on each GPU.

Committed, so that a review shows a kernel that grew; `differences` names it in a test, and an old table.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from .aot_compile import Compiled

PATH = Path(__file__).parent / "results/aot.csv"
KEY = ("target", "dtype", "op", "kernel")
FACTS = ("warps", "registers", "shared", "instructions", "tensor", "wide")
LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # words, and when one is worse than another
    "registers": ("registers", lambda one, other: one > other + 8),  # a GPU shares them out in eights
    "shared": ("bytes of shared memory", lambda one, other: one > other),
    "instructions": ("instructions", lambda one, other: one > 1.05 * other),
    "wide": ("of the bytes in wide accesses", lambda one, other: one < other - 0.05),
}
RENEW = "renew it with --once --write"

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


def differences(row: Compiled, table: dict[Key, dict[str, str]]) -> Iterator[str]:
    """What a kernel's first launch takes more of than the table says, or so much less that it is old."""
    if not table or not row.first:
        return
    before, now = table.get(key(row)), facts(row)
    if before is None:
        yield f"the table has no row for it: {RENEW}"
        return
    if before["tensor"] != now["tensor"]:
        yield f"{now['tensor'] or 'no tensor core'}, the table has {before['tensor'] or 'none'}"
    for name, (words, worse) in LIMITS.items():
        here, there = float(now[name]), float(before[name])
        if worse(here, there):
            yield f"{now[name]} {words}, the table has {before[name]}"
        elif worse(there, here):
            yield f"only {now[name]} {words}, the table has {before[name]}: {RENEW}"
