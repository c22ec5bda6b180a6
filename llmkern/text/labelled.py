"""Texts with labels: read from CSV, JSONL and Parquet, as tokens, in padded batches."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .tokenizer import Tokenizer

PADDING = -1  # behind the tokens of shorter texts
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
CHUNK = 16  # batches that are sorted by length together


class Row(NamedTuple):
    """One text of a table, and where it stands there."""

    text: str
    label: str
    where: str


def read_table(path: Path, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """The rows of a .csv, .tsv, .jsonl, .ndjson or .parquet file; numbers and truth values become text.

    Raises:
        UserError: which file, which row, what it lacks.
    """
    reader = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv}.get(path.suffix.lower(), _jsonl)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{str(path)!r} is not known as a table, expected one of {', '.join(SUFFIXES)}")
    try:
        rows = [
            Row(_value(row, text_column, where), _value(row, label_column, where), where)
            for where, row in reader(path)
        ]
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}); give a readable file") from None
    except UnicodeDecodeError:
        raise UserError(f"{str(path)!r} is not UTF-8; convert it to UTF-8 first") from None
    if not rows:
        raise UserError(f"{str(path)!r} has no rows, expected texts with labels")
    return rows


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise UserError(f"{where} has more columns than the first line; quote texts with commas")
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not CSV ({error}); mend the line") from None


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON ({error}); mend the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is a JSON {type(row).__name__}, expected an object")
            yield f"{path}:{number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("Parquet needs the library pyarrow; `pip install llmkern[data]`") from None
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    except pyarrow.ArrowException as error:
        raise UserError(f"{str(path)!r} is not Parquet ({error}); give another file") from None


def _value(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        has = ", ".join(map(str, row))
        raise UserError(f"{where} has no column {column!r} (it has {has}); name it with --text-column or "
                        "--label-column")  # fmt: skip
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where} has nothing in its column {column!r}; fill it in, or leave out the row")
    if not isinstance(value, (str, int, float, bool)):
        kind = type(value).__name__
        raise UserError(f"{where} has a {kind} in its column {column!r}, expected text or a number")
    return str(value)


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of some rows, sorted; numbers by their size.

    Raises:
        UserError: fewer than two.
    """
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise UserError(f"all {len(rows)} rows have the label {labels.pop()!r}, expected at least 2 labels")
    numbers = all(label.lstrip("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if numbers else str))


class Examples(NamedTuple):
    """Texts as tokens, with their classes.

    Attributes:
        tokens: of each text.
        classes: (n,) int64.
        cut: how many texts were longer than allowed, and lost their ends.
    """

    tokens: list[np.ndarray]
    classes: np.ndarray
    cut: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: np.ndarray) -> "Examples":
        """Those numbered `index`."""
        return Examples([self.tokens[i] for i in index.tolist()], self.classes[index], self.cut)

    def batch(self, index: Sequence[int], device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(B, T) tokens, with -1 behind shorter texts, and (B,) classes of those numbered `index`."""
        width = max(len(self.tokens[i]) for i in index)
        padded = np.full((len(index), width), PADDING, np.int64)
        for row, i in zip(padded, index):
            row[: len(self.tokens[i])] = self.tokens[i]
        classes = torch.from_numpy(self.classes[np.asarray(index)])
        return torch.from_numpy(padded).to(device), classes.to(device)


def encode_rows(
    rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> Examples:
    """Rows as examples; texts of more than `max_tokens` lose their ends.

    Raises:
        UserError: a label that is none of `labels`, or a text that the tokenizer cannot encode.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.label not in numbers:
            known = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise UserError(f"{row.where} has the label {row.label!r}, expected one of {known}")
    tokens = []
    for row in rows:
        try:
            tokens.append(tokenizer.encode_array(row.text))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    cut = sum(len(t) > max_tokens for t in tokens)
    return Examples([t[:max_tokens] for t in tokens], np.array([numbers[r.label] for r in rows]), cut)


def hold_out(
    examples: Examples, labels: Sequence[str], share: float, seed: int = 0
) -> tuple[Examples, Examples]:
    """Examples to train on, and `share` of those of each class, at least one, to validate with.

    Raises:
        UserError: a class with a single example.
    """
    random, held = np.random.default_rng(seed), []
    for number, count in sorted(Counter(examples.classes.tolist()).items()):
        if count < 2:
            raise UserError(
                f"label {labels[number]!r} has 1 text, expected at least 2: to train and to validate"
            )
        places = random.permutation(np.flatnonzero(examples.classes == number))
        held.append(places[: min(count - 1, max(1, round(share * count)))])
    held_out = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(examples)), held_out)
    return examples.select(rest), examples.select(held_out)


class ExampleBatches:
    """`batches[step]` is a pair (tokens, classes); each example comes once in an epoch.

    Texts of like lengths come together.  The examples of a step depend on nothing but the seed and the step.

    Args:
        examples: at least one.
        batch_size: the most in a batch.
        seed: not negative.
        device: where the batches go.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int = 0, device: str = "cpu") -> None:
        self.examples, self.batch_size, self.seed, self.device = examples, batch_size, seed, device
        self.epoch_steps = -(-len(examples) // batch_size)
        self._epoch, self._order = -1, []

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, self.epoch_steps)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        return self.examples.batch(self._order[place], self.device)

    def _ordered(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: shuffled, sorted by length within chunks, and shuffled again."""
        random, size = np.random.default_rng((self.seed, epoch)), self.batch_size
        order = random.permutation(len(self.examples)).tolist()
        batches = []
        for start in range(0, len(order), size * CHUNK):
            chunk = sorted(order[start : start + size * CHUNK], key=lambda i: len(self.examples.tokens[i]))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in random.permutation(len(batches)).tolist()]
