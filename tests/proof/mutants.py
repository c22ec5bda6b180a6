"""Seeded bugs: one line of the project is broken at a time, and a test must go red.

`mutants/` lists them, a file for each family.  A mutant is made in a copy of the project, C++ is compiled
there for one instruction set, and the tests that guard the line are run until the first failure.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from llmkern._cpu import INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).with_name("mutants")
ISA = "avx2"  # compiles faster than AVX-512, and every kernel has it
LIMIT = 90.0  # seconds, after which a mutant that hangs counts as seen


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
    tests: str

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
    return [
        Mutant(path.stem, **entry)
        for path in sorted(LISTS.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["mutant"]
    ]


@contextmanager
def project_copy() -> Iterator[Path]:
    """A copy of the project, imported as `llmkern` when first on the path, with C++ for `ISA` alone."""
    others = [f"*_cpu_{isa}.*" for isa in INSTRUCTION_SETS if isa != ISA]
    ignore = shutil.ignore_patterns("__pycache__", "results", *others)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("llmkern", "kernels", "csrc", "tests", "benchmarks", "examples", "docs"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / file, copy)
        (copy / "llmkern/kernels").symlink_to(copy / "kernels")
        yield copy


def judge(mutant: Mutant, copy: Path) -> Verdict:
    """Break the line in the copy, run its tests, and mend it again."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return Verdict(mutant, False, 0.0, f"its text stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if mutant.compiled and (failed := compile_copy(copy)):
            return Verdict(mutant, False, 0.0, f"does not compile: {failed}")
        return _test(mutant, copy)
    finally:
        path.write_text(text)


def compile_copy(copy: Path) -> str:
    """Compile C++ for one instruction set; what the compiler complained of, if it failed."""
    environment = {**os.environ, "LLMKERN_ISA": ISA}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return "" if "C++ kernels are missing" not in done.stderr else done.stdout[-500:]


def _test(mutant: Mutant, copy: Path) -> Verdict:
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ATEN_CPU_CAPABILITY": ISA,
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONSAFEPATH", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *mutant.tests.split(" ; ")], cwd=copy, env=environment, capture_output=True,
            text=True, timeout=LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Verdict(mutant, True, LIMIT, "hangs")
    seconds = time.perf_counter() - start
    if done.returncode in (0, 4, 5):  # all passed, or nothing ran
        return Verdict(mutant, False, seconds, f"pytest {mutant.tests}: {_last_line(done.stdout)}")
    first = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "crash")
    return Verdict(mutant, True, seconds, first.split(" - ")[0])


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def judge_all(chosen: list[Mutant]) -> list[Verdict]:
    """All of them, those of C++ beside the others, each kind in a copy of the project."""
    verdicts: list[Verdict] = []

    def work(waiting: list[Mutant]) -> None:
        with project_copy() as copy:
            if waiting[0].compiled:
                compile_copy(copy)
            verdicts.extend(judge(mutant, copy) for mutant in waiting)

    kinds = [m for m in chosen if m.compiled], [m for m in chosen if not m.compiled]
    threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds if kind]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


if __name__ == "__main__":  # python tests/proof/mutants.py [family ...]
    names = sys.argv[1:]
    for verdict in judge_all([m for m in mutants() if not names or m.family in names]):
        state = "killed  " if verdict.killed else "SURVIVED"
        change = f"{verdict.mutant.family}: {verdict.mutant.new!r}"
        print(f"{state} {verdict.seconds:5.1f} s  {change}  {verdict.why}")
