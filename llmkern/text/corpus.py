"""Corpora: Tiny Shakespeare, the documentation inside Python, or a text file of your own."""

import hashlib
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

# Karpathy 2015, The Unreasonable Effectiveness of Recurrent Neural Networks
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FILE_NAMES = ("tinyshakespeare.txt", "input.txt")
TIMEOUT = 20.0  # seconds


class Corpus(NamedTuple):
    """A text and where it came from."""

    name: str
    text: str
    origin: str


class Unavailable(UserError):
    """A built-in corpus that is neither on this machine nor within reach."""


def load(source: str | os.PathLike | None = None) -> Corpus:
    """The text to train on.

    Args:
        source: "shakespeare": from `$LLMKERN_DATA` (the file or its folder), else from the user's
            cache, else downloaded into the cache; "python-docs": the prose of `pydoc_data.topics`,
            inside every CPython; or the path of a UTF-8 text file.  None is "shakespeare", or
            "python-docs" when that cannot be had, and `origin` says so.

    Raises:
        UserError: the file is missing, unreadable, empty, not UTF-8, or not the one expected.
    """
    if source == "shakespeare":
        return _shakespeare()
    if source == "python-docs":
        return _python_docs("this Python")
    if source is not None:
        path = Path(source)
        return Corpus(path.name, _decode(_read(path), path), str(path))
    try:
        return _shakespeare()
    except Unavailable as error:
        return _python_docs(f"this Python, because {error}")


def _shakespeare() -> Corpus:
    path = _in_data_folder()
    if path is not None:
        data = _read(path)
        if not _is_shakespeare(data):
            raise UserError(
                f"{path} is not Tiny Shakespeare ({len(data):,} bytes of another content), expected "
                f"{SHAKESPEARE_BYTES:,} bytes; to train on it as it is, give it as --data {path}"
            )
    else:
        path = cache_folder() / FILE_NAMES[0]
        data = path.read_bytes() if path.is_file() else b""
        if not _is_shakespeare(data):
            data = _download(path)
    return Corpus("shakespeare", data.decode(), str(path))


def _in_data_folder() -> Path | None:
    """The file that `$LLMKERN_DATA` points at, if it is set."""
    given = os.environ.get("LLMKERN_DATA")
    if not given:
        return None
    path = Path(given)
    if not path.exists():
        raise UserError(f"LLMKERN_DATA is {given!r}, which does not exist; expected a folder or a text file")
    if path.is_file():
        return path
    return next((path / name for name in FILE_NAMES if (path / name).is_file()), None)


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/llmkern`, by default `~/.cache/llmkern`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkern"


def _is_shakespeare(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


def _download(path: Path) -> bytes:
    """Fetch Tiny Shakespeare to `path`, which appears whole and checked or not at all."""
    advice = f"download {SHAKESPEARE_URL} by other means and set LLMKERN_DATA to it"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as reply:
            data = reply.read(SHAKESPEARE_BYTES + 1)
        if not _is_shakespeare(data):
            raise Unavailable(f"the download of Tiny Shakespeare has a wrong checksum; {advice}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, path.name)
            part.write_bytes(data)
            part.replace(path)
    except OSError as error:  # no network, or no place to write
        raise Unavailable(f"Tiny Shakespeare cannot be downloaded ({error}); {advice}") from error
    return data


def _python_docs(origin: str) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data, the corpus python-docs; give a text file") from None
    return Corpus("python-docs", "\n\n".join(topics[name] for name in sorted(topics)), origin)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data {str(path)!r} does not exist; expected 'shakespeare', 'python-docs' or a text file"
        ) from None
    except OSError as error:
        raise UserError(f"data {str(path)!r} cannot be read ({error.strerror}); give a text file") from None


def _decode(data: bytes, path: Path) -> str:
    if not data:
        raise UserError(f"data {str(path)!r} is empty; expected UTF-8 text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data {str(path)!r} is not UTF-8 (byte {data[error.start]:#04x} at position {error.start}); "
            "convert it to UTF-8 first"
        ) from None
