"""Seeded bugs: one line of the project is broken at a time, and a test must go red.

`mutants/` lists them, a file for each family.  A mutant is made in a copy of the project, C++ is compiled
there for one instruction set, and the tests that guard the line are run until the first failure.
"""

import itertools
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from proof.copies import ROOT, Copy

LISTS = Path(__file__).with_name("mutants")
LIMIT = 60.0  # seconds, after which a mutant that hangs counts as seen


@dataclass(frozen=True)
class Mutant:
    """One broken line.

    Attributes:
        family: attention, ffn, norm, loss, optim, ..., train, checkpoint, swap.
        file: relative to the project.
        old: text that stands in the file once.
        new: what is put there.
        tests: arguments of pytest that name the tests which guard the line.
    """

    family: str
    file: str
    old: str
    new: str
    tests: list[str]

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    killed: bool
    seconds: float  # of the tests, without compilation
    why: str  # what a surviving one did, or the first test that saw it


def mutants() -> list[Mutant]:
    return [mutant for path in sorted(LISTS.glob("*.toml")) for mutant in _read(path)]


def _read(path: Path) -> list[Mutant]:
    """A family: `[tests]` names arguments of pytest, and each `[[mutant]]` says which of them guard it."""
    family = tomllib.loads(path.read_text())
    tests = family["tests"]
    return [Mutant(path.stem, m["file"], m["old"], m["new"], tests[m["tests"]]) for m in family["mutant"]]


class Judge(Copy):
    """A copy of the project in which mutants are made and tested."""

    def __enter__(self) -> "Judge":
        super().__enter__()
        self._runner = subprocess.Popen(
            [sys.executable, ROOT / "tests/proof/forked.py"], cwd=self.path, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._runner.stdout.readline()  # it is ready
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.stdin.close()
        self._runner.wait()
        super().__exit__(*error)

    def judge(self, mutant: Mutant) -> Verdict:
        """Break the line, run its tests, and mend it again."""
        path = self.path / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            why = f"its text stands {text.count(mutant.old)} times in {mutant.file}"
            return Verdict(mutant, False, 0.0, why)
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            if mutant.compiled and (failed := self.compile()):
                return Verdict(mutant, False, 0.0, f"does not compile: {failed}")
            return self._test(mutant)
        finally:
            path.write_text(text)

    def _test(self, mutant: Mutant) -> Verdict:
        log = self.path / "log"
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
        start = time.perf_counter()
        request = [[*options, *mutant.tests], LIMIT, str(log)]
        print(json.dumps(request), file=self._runner.stdin, flush=True)
        code = json.loads(self._runner.stdout.readline())
        seconds = time.perf_counter() - start
        lines = log.read_text(errors="replace").strip().splitlines()
        if code in (0, 4, 5):  # all passed, or nothing ran
            return Verdict(
                mutant, False, seconds, f"pytest {shlex.join(mutant.tests)}: {lines[-1] if lines else ''}"
            )
        first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "a crash")
        return Verdict(mutant, True, seconds, "hangs" if code is None else first.split(" - ")[0])


def judge_all(chosen: list[Mutant]) -> Iterator[Verdict]:
    """A verdict on each as it is known, from two judges with a copy each: one has those of C++ first."""
    found: queue.Queue[Verdict | Exception] = queue.Queue()
    in_order = sorted(chosen, key=lambda m: m.file)  # a file is compiled fewer times
    compiled, others = (deque(m for m in in_order if m.compiled == kind) for kind in (True, False))

    def work(*kinds: deque[Mutant]) -> None:
        try:
            with Judge() as judge:
                for mutant in itertools.chain(*map(_taken, kinds)):
                    found.put(judge.judge(mutant))
        except Exception as error:
            found.put(error)

    for kinds in (compiled, others), (others,):
        if any(kinds):
            threading.Thread(target=work, args=kinds, daemon=True).start()
    for _ in chosen:
        verdict = found.get()
        if isinstance(verdict, Exception):
            raise verdict
        yield verdict


def _taken(waiting: deque[Mutant]) -> Iterator[Mutant]:
    """One after the other, while somebody else takes of them too."""
    with suppress(IndexError):
        while True:
            yield waiting.popleft()
