"""Files and folders that appear whole or not at all, also when the process is killed or the disk is full.

The order is what makes it safe: write, fsync, rename, fsync the folder that holds the new name (Pillai et
al. 2014, All File Systems Are Not Created Equal, OSDI).  Every write goes through `os` by name here, so
that tests can stop at each of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
PIECE = 2**20  # bytes in one write


class Damaged(Exception):
    """A folder that is not what was written; the message says in what."""


class NewFolder:
    """A folder that gets its name, and a manifest with the sha256 of every file, when the `with` block ends.

        with NewFolder(path) as folder:
            folder.write("weights.bin", [b"...", b"..."])

    An exception in the block leaves nothing behind.  What a killed process left is named `.*.part`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.files: dict[str, dict[str, int | str]] = {}

    def __enter__(self) -> "NewFolder":
        shutil.rmtree(self.part, ignore_errors=True)
        os.makedirs(self.part)
        return self

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write the file `name`, and remember its size and sha256."""
        digest, size = hashlib.sha256(), 0
        with _create(self.part / name) as fd:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                digest.update(view)
                size += len(view)
                _write_all(fd.number, view)
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                files = dict(self.files)
                self.write(MANIFEST, [json.dumps({"files": files}, indent=1).encode()])
                sync(self.part)
                rename(self.part, self.path)
        finally:
            shutil.rmtree(self.part, ignore_errors=True)


class _create:
    """A new file, synced to the disk when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> "_create":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                os.fsync(self.number)
        finally:
            os.close(self.number)


def _write_all(fd: int, view: memoryview) -> None:
    start = 0
    while start < len(view):
        start += os.write(fd, view[start : start + PIECE])  # may write less than it was given


def write_file(path: Path, data: bytes) -> None:
    """Replace the file `path` by one with `data`: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with _create(part) as fd:
            _write_all(fd.number, memoryview(data))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Give a folder its name; what had that name before is set aside first, and then removed."""
    aside = new.with_name(f".{new.name}.old.part")
    shutil.rmtree(aside, ignore_errors=True)
    if new.exists():
        os.rename(new, aside)
    os.rename(old, new)
    sync(new.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder; one that is half removed does not keep its name."""
    aside = path.with_name(f".{path.name}.old.part")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "posix":  # Windows opens no folders
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: a file is missing, or of another size or content.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (about["bytes"], about["sha256"]) for name, about in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is missing or not readable") from None
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != set(expected):
        names = ", ".join(sorted(there ^ set(expected)))
        raise Damaged(f"its files are not those of {MANIFEST} ({names})")
    for name, (size, sha256) in expected.items():
        path = folder / name
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        with path.open("rb") as file:
            if _digest(file) != sha256:
                raise Damaged(f"{name} has another sha256 than {MANIFEST} says")


def _digest(file) -> str:
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()
