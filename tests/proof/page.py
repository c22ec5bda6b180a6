"""docs/proof.md, from the rows of a run."""

from llmkern.machine import describe
from proof.copies import ROOT
from proof.rows import Row

PATH = ROOT / "docs/proof.md"
HEAD = """\
# Proof

Made by `make prove` on {date}: {cpu}, {cores} cores, {system}, Python {python}, torch {torch},
triton {triton}, llmkern {llmkern} at {commit}, in {minutes:.0f} minutes. Nothing here is written by hand.
Every row has a control: a planted failure of its class, which has to turn it red in the same run, or in the
test that is named. The rule for errors and its terms are in [numerics.md](numerics.md), the tools in
`tests/proof/`.

| what | figure | found | | control | seconds | again |
|---|---|---|---|---|---|---|
"""


def write(made: list[tuple[Row, float]], left: list[str]) -> None:
    """Write the page; `left` are the parts that have not ended yet, and stay out if the run is stopped."""
    machine = describe("cpu")
    machine["commit"] = (machine["commit"] or "no commit")[:10]
    seconds = sum({row.command: took for row, took in made}.values())
    text = HEAD.format(**machine, minutes=seconds / 60)
    for row, took in made:
        state = "ok" if row.good else "**missed**"
        cells = row.what, row.figure, row.found, state, row.control, f"{took:.0f}", f"`{row.command}`"
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    if left:
        text += (
            f"\nStopped before the end: {', '.join(left)} are missing; `python tests/proof PART` runs one.\n"
        )
    for row, _ in made:
        if row.details.strip():
            text += f"\n## {row.what[0].upper()}{row.what[1:]}\n\n{row.details.strip()}\n"
    PATH.write_text(text, encoding="utf-8")
