"""Scores as tables, as JSON, and as a picture."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .classes import Scores


def show_scores(console: Console, scores: Scores) -> None:
    """A line, and a table of classes with the confusion matrix."""
    texts = int(scores.confusion.sum())
    console.print(
        f"{texts:,} texts: accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, "
        f"loss {scores.loss:.4f}"
    )
    table = Table()
    for name in ("true class", "texts", "precision", "recall", "F1", *(f"as {x}" for x in scores.labels)):
        table.add_column(name, justify="left" if name == "true class" else "right")
    measures = zip(scores.labels, scores.precision, scores.recall, scores.f1, scores.confusion)
    for label, precision, recall, f1, row in measures:
        values = (f"{value:.3f}" for value in (precision, recall, f1))
        table.add_row(label, f"{row.sum():,}", *values, *(f"{n:,}" for n in row))
    console.print(table)


def show_tasks(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """A table of tasks and their measures, as the harness names them."""
    table = Table("task", "measure")
    for name in ("value", "± standard error"):
        table.add_column(name, justify="right")
    for task, measures in results.items():
        for name, value in measures.items():
            measure, _, filtered = name.partition(",")
            if not filtered or measure.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = measures.get(f"{measure}_stderr,{filtered}")
            table.add_row(task, measure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    console.print(table)


def save_scores(console: Console, folder: Path, scores: Scores, name: str, more: dict[str, Any]) -> None:
    """`name`.json, and confusion.png where matplotlib is installed; says what was saved."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**more, **scores.summary()}, indent=1) + "\n")
    saved = [path]
    try:
        from ..plots import confusion
    except ImportError:
        console.print("No picture: matplotlib is missing; `pip install llmkern[plot]`")
    else:
        saved.append(folder / "confusion.png")
        title = f"accuracy {scores.accuracy:.3f}, macro-F1 {scores.macro_f1:.3f}"
        confusion(saved[-1], scores.confusion.tolist(), scores.labels, title)
    console.print(f"Saved {' and '.join(str(path) for path in saved)}.", soft_wrap=True)
