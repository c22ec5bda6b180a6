"""What `swap_` and `restore_` tell: one line for each module that was changed or left alone."""

import re
from dataclasses import asdict, dataclass, field


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
    """

    path: str
    was: str
    now: str | None
    note: str = ""


@dataclass
class Report:
    """The entries, in the order of `model.named_modules()`; `print` shows them as a table."""

    entries: list[Entry] = field(default_factory=list)

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
        rows = [("module", "", "was", "now", "note"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)] + [0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.changed)} modules changed, {len(self.left)} left alone"])

    def _rows(self) -> list[tuple[str, ...]]:
        """One row for all layers: `h.0.ln_1` to `h.11.ln_1` become `h.*.ln_1` and 12x."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            pattern = re.sub(r"\b\d+\b", "*", e.path)
            alike.setdefault((pattern, e.was, e.now or "left alone", e.note), []).append(e.path)
        return [
            (pattern if len(paths) > 1 else paths[0] or "(the model)", f"{len(paths)}x", *rest)
            for (pattern, *rest), paths in alike.items()
        ]
