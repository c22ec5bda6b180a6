"""A Proof as text."""

from typing import TYPE_CHECKING

from .compare import Row

if TYPE_CHECKING:
    from . import Proof

SHOWN = 5  # gradients, the worst first


def describe(proof: "Proof") -> str:
    """The table of errors, a line for everything else, and the verdict."""
    lines = [*_table(proof.rows)]
    lines.append(
        f"gradient against a finite difference in float64: {proof.slope:.1e} apart, "
        f"allowed {proof.slope_allowed:.1e}"
    )
    for what, same in proof.determinism.items():
        ours, torch = ("the same bits" if each else "other bits" for each in same)
        lines.append(f"{what}: llmkern gives {ours}, torch {torch}")
    lines.append(f"restore_: {'the same bits' if proof.restored else 'OTHER BITS'} as the original")
    lines.append(f"forward and backward: {proof.speedup:.2f} times as fast as torch, here and now")
    failures = proof.failures()
    verdict = f"NOT the same: {'; '.join(failures[:SHOWN])}" if failures else "the same"
    more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
    changed = len(proof.swapped.changed)
    return "\n".join([*lines, f"verdict: {verdict}{more} ({changed} modules swapped, {proof.seconds:.0f} s)"])


def _table(rows: list[Row]) -> list[str]:
    gradients = [row for row in rows if row.name.startswith("gradient of")]
    worst = sorted(gradients, key=lambda row: row.ours / row.allowed, reverse=True)[:SHOWN]
    shown = [row for row in rows if row not in gradients or row in worst]
    table = [("relative error against float64", "llmkern", "torch", "allowed", "")]
    for row in shown:
        numbers = (f"{x:.1e}" for x in (row.ours, row.torch, row.allowed))
        table.append((row.name, *numbers, "" if row.passed else "FAILED"))
    width = max(len(line[0]) for line in table)
    lines = ["  ".join((a.ljust(width), *(c.rjust(8) for c in rest))).rstrip() for a, *rest in table]
    failed = sum(not row.passed for row in gradients if row not in worst)
    if rest := len(gradients) - len(worst):
        lines.append(f"... and {rest} more gradients, {failed or 'none'} of them with more than is allowed")
    return lines
