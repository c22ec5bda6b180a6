"""Documents from text, JSONL and Parquet files, one after another, whatever their number."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import corpus

TEXT = (".txt", ".text", ".md", ".rst")
JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
BUILT_IN = ("shakespeare", "python-docs")


@dataclass(frozen=True)
class Sources:
    """Where documents come from; iterating reads them again, in the same order.

    Args:
        names: files, folders, "shakespeare" or "python-docs".  Of a folder the files with a known suffix
            are read, those in folders below it too, in the order of their names.
        field: the name of the text in JSONL lines, and of its column in Parquet files.
        separator: cuts text files into documents; None makes each file one.
        encoding: of text and JSONL files.
    """

    names: Sequence[str]
    field: str = "text"
    separator: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise UserError(
                f"encoding is {self.encoding!r}, expected one that Python knows, such as utf-8 or latin-1"
            ) from None

    def paths(self) -> list[str]:
        """Every file and built-in corpus, in order.

        Raises:
            UserError: a source that is not there, or a folder without a file that is known.
        """
        return [path for name in self.names for path in _expand(name)]

    def __iter__(self) -> Iterator[str]:
        """The texts of all documents.

        Raises:
            UserError: a file that cannot be read as what it seems to be: which one, where, what to do.
        """
        for path in self.paths():
            yield from self.read(path)

    def read(self, path: str) -> Iterator[str]:
        """The texts of one file or built-in corpus."""
        if path in BUILT_IN:
            yield from self._cut(corpus.load(path).text)
            return
        suffix = Path(path).suffix.lower()
        try:
            if suffix in PARQUET:
                yield from self._parquet(Path(path))
            elif suffix in JSONL:
                yield from self._jsonl(Path(path))
            else:
                yield from self._cut(self._decode(Path(path).read_bytes(), path))
        except OSError as error:
            raise UserError(f"source {path!r} cannot be read ({error}); give a readable file") from None

    def _cut(self, text: str) -> Iterator[str]:
        yield from text.split(self.separator) if self.separator else (text,)

    def _decode(self, data: bytes, where: str) -> str:
        try:
            return data.decode(self.encoding)
        except UnicodeDecodeError as error:
            raise UserError(
                f"source {where!r} is not {self.encoding} (byte {data[error.start]:#04x} at position "
                f"{error.start}); name its encoding with --encoding, such as latin-1 or utf-16"
            ) from None

    def _jsonl(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = json.loads(self._decode(line, where))
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"source {where!r} is not JSON ({error}); mend or leave out the line"
                    ) from None
                text = value.get(self.field) if isinstance(value, dict) else None
                if not isinstance(text, str):
                    has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                    raise UserError(
                        f"source {where!r} has no text {self.field!r} (it has {has}); name it with --field"
                    )
                yield text

    def _parquet(self, path: Path) -> Iterator[str]:
        try:
            import pyarrow as arrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError("Parquet needs the library pyarrow; `pip install llmkern[data]`") from None
        try:
            with ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.field not in names:
                    raise UserError(
                        f"source {str(path)!r} has no column {self.field!r} (it has {', '.join(names)}); "
                        "name it with --field"
                    )
                for batch in file.iter_batches(columns=[self.field]):
                    yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except arrow.ArrowException as error:
            raise UserError(f"source {str(path)!r} is not Parquet ({error}); give another file") from None


def _expand(name: str) -> list[str]:
    path = Path(name)
    if name in BUILT_IN and not path.exists():
        return [name]
    if not path.exists():
        raise UserError(
            f"source {name!r} does not exist; expected a file, a folder or {' or '.join(BUILT_IN)}"
        )
    if not path.is_dir():
        return [name]
    known = (*TEXT, *JSONL, *PARQUET)
    found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not found:
        raise UserError(f"source {name!r} has no file that is known, expected one of {', '.join(known)}")
    return found
