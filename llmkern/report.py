"""What `swap_` and `restore_` tell: one line for each module that was changed or left alone."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class NoEffectWarning(UserWarning):
    """`swap_` found nothing to swap."""


class SwapError(RuntimeError):
    """`swap_(strict=True)` found a module that it would have to leave alone."""


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        path: its name in the model, "" for the model itself.
        was: its class before.
        now: its class after; None when it was left alone.
        note: why it was left alone, or what torch still computes in it.
        runs: which implementation ran each op in it, when the report was given an example.
    """

    path: str
    was: str
    now: str | None
    note: str = ""
    runs: str = ""


class Change(NamedTuple):
    """Something to do to a module, and what the report says of it."""

    entry: Entry
    do: Callable[[], object] = lambda: None


@dataclass
class Report:
    """The entries, in the order of `model.named_modules()`; `print` shows them as a table."""

    entries: list[Entry] = field(default_factory=list)
    watch: Callable[[Any], "Report"] | None = field(default=None, repr=False, compare=False)

    def explain(self, example: Any) -> "Report":
        """This report with the implementations that ran, in the column `runs`.

        Args:
            example: a batch for the model: a tensor, a tuple of arguments or a dict of keyword
                arguments.  The model runs it once, forward; for backward it is found out what would run.
        """
        if self.watch is None:
            raise ValueError("explain: this report is of no swap_, expected what swap_ returned")
        return self.watch(example)

    @property
    def changed(self) -> list[Entry]:
        """Modules that have another class now."""
        return [e for e in self.entries if e.now is not None and e.now != e.was]

    @property
    def left(self) -> list[Entry]:
        """Modules that were left alone, with the reason in `note`."""
        return [e for e in self.entries if e.now is None]

    def to_dict(self) -> dict[str, list[dict]]:
        """For JSON: {"changed": [...], "left": [...]} with the fields of `Entry`."""
        return {"changed": [asdict(e) for e in self.changed], "left": [asdict(e) for e in self.left]}

    def __str__(self) -> str:
        rows = [("module", "", "was", "now", "runs", "note"), *self._rows()]
        if not any(e.runs for e in self.entries):
            rows = [(*row[:4], row[5]) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.changed)} modules changed, {len(self.left)} left alone"])

    def _rows(self) -> list[tuple[str, ...]]:
        """One row for all layers: `h.0.ln_1` to `h.11.ln_1` become `h.*.ln_1` and 12x."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            pattern = re.sub(r"\b\d+\b", "*", e.path)
            key = pattern, e.was, e.now or "left alone", e.runs, e.note
            alike.setdefault(key, []).append(e.path)
        return [
            (pattern if len(paths) > 1 else paths[0] or "(the model)", f"{len(paths)}x", *rest)
            for (pattern, *rest), paths in alike.items()
        ]


def class_name(cls: type | object) -> str:
    """torch.nn.LayerNorm, llmkern.nn.LayerNorm, mine.Model: where users import it from."""
    cls = cls if isinstance(cls, type) else type(cls)
    for prefix in ("torch.nn", "llmkern.nn.plain", "llmkern.nn"):
        if cls.__module__.startswith(prefix + "."):
            return f"{prefix}.{cls.__name__}"
    package = cls.__module__.split(".")[0]
    return f"{package if package == 'transformers' else cls.__module__}.{cls.__qualname__}"
