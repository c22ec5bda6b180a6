"""The matrix: what is measured of a model before and after swap_, and how a table in the docs comes of it."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import llmkern
from llmkern import machine
from llmkern.prove.compare import equal
from llmkern.prove.judge import Outcome, Subject
from llmkern.swap.example import call

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/swap.md")
BEGIN, END = "<!-- matrix: pytest tests/swap --matrix -->", "<!-- end of the matrix -->"
HEAD = ("model", "forward", "forward and backward", "generate", "torch.compile", "restore_")


class Against(NamedTuple):
    """Errors relative to float64, and how many times as fast as torch."""

    ours: float
    torch: float
    speed: float

    def __str__(self) -> str:
        return f"{self.ours:.1e} ({self.torch:.1e}), {self.speed:.2f}x"


class Row(NamedTuple):
    """One model.

    Attributes:
        forward: in evaluation; the error is that of the outputs.
        backward: a forward and backward in training; the error is that of all gradients together.
        same_tokens, generate: whether greedy decoding gave the same, and its speed; None if it has none.
        compiled: as `backward`, of torch.compile(backend="llmkern") on the unswapped model, against eager.
        restored: whether restore_ gave the bits of the original.
    """

    model: str
    forward: Against
    backward: Against
    same_tokens: bool | None
    generate: float | None
    compiled: Against
    restored: bool

    def cells(self) -> tuple[str, ...]:
        told = "" if self.generate is None else f"{self.generate:.2f}x"
        same = {True: "same tokens, ", False: "OTHER TOKENS, ", None: "none"}[self.same_tokens]
        restored = "same bits" if self.restored else "OTHER BITS"
        return self.model, str(self.forward), str(self.backward), same + told, str(self.compiled), restored


def measure(
    name: str, model: nn.Module, batch: Any, prompt: Tensor | None = None, new: int = 8, rounds: int = 1
) -> Row:
    """A row for the model, whose batch gives a loss; `new` tokens are generated behind `prompt`."""
    plain, ours, judge = (Subject(model, batch, None, float64=f64) for f64 in (False, False, True))
    assert llmkern.swap_(ours.model).changed
    first, reference, truth = ours.run(), plain.run(), judge.run()
    forward = _forward_speed(plain, ours, batch, rounds)
    backward = _speedup([plain.run, ours.run], rounds)
    compiled = Subject(model, batch, None)
    compiled.model.compile(backend=llmkern.backend)
    traced = compiled.run()
    compiled_speed = _speedup([plain.run, compiled.run], rounds)
    tokens, generate = _generate(plain, ours, prompt, new, rounds)
    llmkern.restore_(ours.model)
    return Row(
        name,
        Against(*(_error(o.outputs, truth.outputs) for o in (first, reference)), forward),
        Against(*(_error(o.grads, truth.grads) for o in (first, reference)), backward),
        tokens,
        generate,
        Against(*(_error(o.grads, truth.grads) for o in (traced, reference)), compiled_speed),
        _restored(ours, reference),
    )


def _restored(ours: Subject, reference: Outcome) -> bool:
    return equal(ours.run(), reference)


@torch.no_grad()
def _forward_speed(plain: Subject, ours: Subject, batch: Any, rounds: int) -> float:
    models = [copy.deepcopy(subject.model).eval() for subject in (plain, ours)]
    return _speedup([lambda model=model: call(model, batch) for model in models], rounds)


def _generate(
    plain: Subject, ours: Subject, prompt: Tensor | None, new: int, rounds: int
) -> tuple[bool | None, float | None]:
    if prompt is None:
        return None, None
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    models = [subject.model.eval() for subject in (plain, ours)]
    works = [lambda model=model: model.generate(prompt, **options) for model in models]
    same = torch.equal(*(work() for work in works))
    speed = _speedup(works, rounds)
    for model in models:
        model.train()
    return same, speed


def _error(tensors: dict[str, Tensor], judge: dict[str, Tensor]) -> float:
    """‖x - x₆₄‖ / ‖x₆₄‖ of all of them together."""
    names = [name for name in judge if name in tensors]
    assert names
    apart = sum((tensors[n].double() - judge[n].double()).square().sum().item() for n in names)
    return math.sqrt(apart / sum(judge[n].double().square().sum().item() for n in names))


def _speedup(works: list[Callable[[], Any]], rounds: int) -> float:
    """Median seconds of the first over those of the second, in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for seconds, work in zip(times, works):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
    plain, ours = (statistics.median(seconds) for seconds in times)
    return plain / ours


def write(rows: list[Row], size: str) -> None:
    """Put the table into the pages, between its two marks."""
    table = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    found = machine.describe("cpu")
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines.append("")
    lines.append(
        f"Errors are relative to float64, torch's in brackets; speed is against eager torch, {size}. "
        f"{found['date']}, {found['cpu']}, {found['threads']} threads ({found['instruction_set']}), "
        f"torch {found['torch']}, commit {found['commit']}."
    )
    for page in PAGES:
        before, _, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        assert end, f"{page.name} has no {BEGIN} ... {END}"
        page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)
