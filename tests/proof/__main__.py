"""python tests/proof [PART ...]: make the proof, or some parts of it.

Without parts it runs all of them and writes docs/proof.md.  It ends with 1 if a row is not as it was asked.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes share the cores

import conftest  # noqa: F401 - Triton's interpreter, before anything imports triton

import llmkern
from proof import mutants, page, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/proof", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "parts", nargs="*", choices=[*rows.PARTS, []], metavar="PART", help=", ".join(rows.PARTS)
    )
    parser.add_argument("--family", nargs="+", help="judge the seeded bugs of these families alone")
    arguments = parser.parse_args()
    llmkern.set_fallback("silent")
    if arguments.family:
        return judge(arguments.family)
    made = []
    for row, seconds, left in rows.run(
        arguments.parts or list(rows.PARTS), lambda text: print(text, flush=True)
    ):
        made.append((row, seconds))
        print(f"{'ok    ' if row.good else 'MISSED'} {seconds:6.0f} s  {row.what}: {row.found}", flush=True)
        if row.details and (arguments.parts or not row.good):
            print(row.details)
        if not arguments.parts:
            page.write(made, left)
    return int(not all(row.good for row, _ in made))


def judge(families: list[str]) -> int:
    """Print what becomes of each mutant; 1 if one survives."""
    survived = 0
    for verdict in mutants.judge_all([m for m in mutants.mutants() if m.family in families]):
        survived += not verdict.killed
        state = "killed  " if verdict.killed else "SURVIVED"
        change = f"{verdict.mutant.file}: {verdict.mutant.new.strip()!r}"
        print(f"{state} {verdict.seconds:5.1f} s  {change}  {verdict.why}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
