"""Folders that appear whole or not at all: what the disk may do, and what is left behind."""

import json

import pytest

from llmkern import durable
from llmkern.durable import Damaged, NewFolder


def _folder(path, **files):
    with NewFolder(path) as folder:
        for name, data in files.items():
            folder.write(name, [data])
    return path


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    """A disk may take less than it was given, without an error."""
    real = durable.os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: real(fd, data[:3]))
    path = _folder(tmp_path / "a", one=bytes(range(100)))
    assert (path / "one").read_bytes() == bytes(range(100))
    durable.verify(path)
    durable.write_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_large_files_are_compared_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "PIECE", 1000)
    path = _folder(tmp_path / "a", one=bytes(9500))
    durable.verify(path)
    (path / "one").write_bytes(bytes(9499) + b"\1")
    with pytest.raises(Damaged, match="one has another sha256"):
        durable.verify(path)


@pytest.mark.parametrize(("change", "says"), [
    (lambda path: (path / "three").write_bytes(b""), "its files are not those .*three"),
    (lambda path: (path / "one").unlink(), "its files are not those .*one"),
    (lambda path: (path / "one").write_bytes(b"12345"), "one has 5 bytes, expected 4"),
    (lambda path: (path / "one").write_bytes(b"123"), "one has 3 bytes, expected 4"),
    (lambda path: (path / "one").write_bytes(b"1235"), "one has another sha256"),
    (lambda path: (path / durable.MANIFEST).unlink(), "missing, or not as it was written"),
    (lambda path: (path / durable.MANIFEST).write_text("[]"), "missing, or not as it was written"),
    (lambda path: (path / durable.MANIFEST).write_text("{"), "missing, or not as it was written"),
    (lambda path: (path / durable.MANIFEST).write_text("{}"), "missing, or not as it was written"),
    (lambda path: (path / durable.MANIFEST).write_bytes(b"\xff"), "missing, or not as it was written"),
    (lambda path: (path / durable.MANIFEST).write_text("[" * 10**5), "missing, or not as it was written"),
])  # fmt: skip
def test_changes_are_named(tmp_path, change, says):
    path = _folder(tmp_path / "a", one=b"1234", two=b"")
    durable.verify(path)
    change(path)
    with pytest.raises(Damaged, match=says):
        durable.verify(path)


def test_a_manifest_that_lies_is_found(tmp_path):
    """It seals itself: another checksum for another file does not help."""
    path = _folder(tmp_path / "a", one=b"1234")
    manifest = json.loads((path / durable.MANIFEST).read_text())
    manifest["files"]["one"]["bytes"] = 5
    (path / durable.MANIFEST).write_text(json.dumps(manifest, indent=1))
    with pytest.raises(Damaged, match=durable.MANIFEST):
        durable.read_manifest(path)


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), NewFolder(tmp_path / "a") as folder:
        folder.write("one", [b"1234"])
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_new_folder_takes_the_place_of_the_old(tmp_path):
    _folder(tmp_path / "a", one=b"1234", two=b"")
    path = _folder(tmp_path / "a", one=b"5")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert {p.name for p in path.iterdir()} == {"one", durable.MANIFEST}


def test_what_is_half_removed_has_no_name(tmp_path, monkeypatch):
    path = _folder(tmp_path / "a", one=b"1234")
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *args, **kwargs: None)
    durable.remove(path)
    assert not path.exists()
    monkeypatch.undo()
    durable.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sweeping_takes_leftovers_alone(tmp_path):
    _folder(tmp_path / "a", one=b"1234")
    for name in ("b.part", ".c", ".part.d"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".file.part").write_bytes(b"half")
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part/x").write_bytes(b"half")
    durable.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b.part", ".c", ".part.d"}


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a"
    durable.write_file(path, b"old")
    monkeypatch.setattr(durable.os, "replace", _fails)
    with pytest.raises(OSError, match="no room"):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def _fails(*args):
    raise OSError("no room")
