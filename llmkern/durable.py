"""Files and folders that appear whole or not at all, also when the process is killed or the disk is full.

The order is what makes it safe: write, fsync, rename, fsync the folder that holds the new name (Pillai et
al. 2014, All File Systems Are Not Created Equal, OSDI).  Every write goes through `os` by name here, so
that tests can stop at each of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PIECE = 2**20  # bytes in one write


class Damaged(Exception):
    """A folder that is not what was written; the message says in what."""


class NewFolder:
    """A folder that gets its name, and a manifest with the sha256 of every file, when the `with` block ends.

        with NewFolder(path) as folder:
            folder.write("weights.bin", [b"...", b"..."])

    An exception in the block leaves nothing behind.  What a killed process left is named `.*.part`.

    Attributes:
        about: more fields of the manifest, plain values.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.about: dict[str, Any] = {}
        self.files: dict[str, dict[str, int | str]] = {}

    def __enter__(self) -> "NewFolder":
        shutil.rmtree(self.part, ignore_errors=True)
        os.makedirs(self.part)
        return self

    @contextmanager
    def file(self, name: str) -> Iterator["NewFile"]:
        """A new file in it; its size and sha256 are remembered."""
        with NewFile(self.part / name) as file:
            yield file
        self.files[name] = {"bytes": file.size, "sha256": file.digest.hexdigest()}

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write the file `name`."""
        with self.file(name) as file:
            for piece in pieces:
                file.write(piece)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.write(MANIFEST, [_sealed({**self.about, "files": self.files})])
                sync(self.part)
                rename(self.part, self.path)
        finally:
            shutil.rmtree(self.part, ignore_errors=True)


class NewFile:
    """A file that is written from its start, and synced to the disk when the block ends well.

    Attributes:
        size, digest: of what was written so far.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.size, self.digest = 0, hashlib.sha256()

    def __enter__(self) -> "NewFile":
        return self

    def write(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece).cast("B")
        self.digest.update(view)
        self.size += len(view)
        start = 0
        while start < len(view):
            start += os.write(self.fd, view[start : start + PIECE])  # may write less than it was given

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)


def write_file(path: Path, data: bytes) -> None:
    """Replace the file `path` by one with `data`: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with NewFile(part) as file:
            file.write(data)
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


def sweep(folder: Path) -> None:
    """Remove what a killed process left in a folder; no other one may be at work there."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "posix":  # Windows opens no folders
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """JSON whose last field is the sha256 of the others."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, every byte as it was written; its "files" are name -> {"bytes", "sha256"}.

    Raises:
        Damaged: there is none, or it was changed.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data)
        del manifest["sha256"]
        whole = _sealed(manifest) == data
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{MANIFEST} is missing, or not as it was written")
    return manifest


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: a file is missing, or of another size or content.
    """
    expected = read_manifest(folder)["files"]
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != set(expected):
        names = ", ".join(sorted(there ^ set(expected)))
        raise Damaged(f"its files are not those of {MANIFEST} ({names})")
    for name, about in expected.items():
        path, size = folder / name, about["bytes"]
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        if sha256(path) != about["sha256"]:
            raise Damaged(f"{name} has another sha256 than {MANIFEST} says")


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
