"""The documentation inside Python, as a folder of text and as a table for a classifier; no download.

    python examples/python_docs.py session      # makes session/texts/*.txt and session/topics.csv

The texts are the language reference in `pydoc_data.topics`, and the docstrings of the standard library, a
file for each module.  The table has the docstrings of some modules, labelled with the topic of the module.
"""

import argparse
import ast
import csv
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TOPICS = {  # label -> modules or packages
    "windows": ("tkinter", "turtle"),
    "mail": ("email", "mailbox", "smtplib", "imaplib", "poplib", "nntplib"),
    "web": ("http", "urllib", "xmlrpc", "wsgiref", "socket", "socketserver", "ssl", "ftplib", "ipaddress"),
    "tasks": ("asyncio", "multiprocessing", "threading", "concurrent", "subprocess", "selectors", "queue"),
    "numbers": ("_pydecimal", "fractions", "statistics", "random", "numbers", "datetime", "calendar"),
    "files": ("pathlib", "os", "shutil", "zipfile", "tarfile", "tempfile", "_pyio", "posixpath", "gzip"),
}
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "ensurepip"}
SHORTEST = 40  # characters of a docstring that says something
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings() -> Iterator[tuple[str, list[str]]]:
    """(module, its docstrings), read from the sources without importing them."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):  # files that are broken on purpose
            continue
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED))
        texts = list(dict.fromkeys(text for text in found if text and len(text) >= SHORTEST))
        if texts:
            yield ".".join(parts), texts


def topic(module: str) -> str | None:
    package = module.split(".")[0]
    return next((label for label, packages in TOPICS.items() if package in packages), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "texts").mkdir(parents=True)
    modules = dict(docstrings())
    from pydoc_data.topics import topics

    documents = {**topics, **{module: "\n\n".join(texts) for module, texts in modules.items()}}
    for name, text in documents.items():
        (folder / "texts" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    rows = {text: topic(module) for module, texts in modules.items() for text in texts}  # each text once
    rows = {text: label for text, label in rows.items() if label}
    with (folder / "topics.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows.items()])
    size = sum(map(len, documents.values()))
    print(f"{folder}: {len(documents)} texts of {size:,} characters, {len(rows):,} docstrings with topics")


if __name__ == "__main__":
    main()
