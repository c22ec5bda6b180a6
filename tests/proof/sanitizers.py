"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy compiled for them.

The tools are libraries that must be loaded before Python's own; they write their reports to files, since
pytest swallows what a dying process prints.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from proof.copies import Copy

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
TESTS = ["tests/ops", "-k", "cpp:avx2 and not compile and not memory", "-x"]
# one vector is read beyond the end of a row
PLANTED = (
    "csrc/softmax.cpp",
    "m = max(m, keep_first(load(x + i, k), k, top));",
    "m = max(m, load(x + i, W));",
)
PLANTED_TESTS = ["tests/ops/test_softmax.py", "-k", "cpp:avx2 and values", "-x"]


class Found(NamedTuple):
    """What came of it."""

    tests: str  # pytest's last line
    reports: list[str]  # the first lines of the tools' reports
    planted: bool  # whether the planted overrun was reported


def sanitize() -> Found:
    """Build, test, plant an overrun and test again.

    Raises:
        RuntimeError: it does not compile.
    """
    with Copy(FLAGS) as copy:
        if complaint := copy.compile():
            raise RuntimeError(complaint)
        tests, reports = _run(copy, TESTS)
        file, old, new = PLANTED
        text = (copy.path / file).read_text()
        assert text.count(old) == 1, f"the planted overrun does not fit {file}"
        (copy.path / file).write_text(text.replace(old, new))
        copy.compile()
        _, planted = _run(copy, PLANTED_TESTS)
    return Found(tests, reports, bool(planted))


def _run(copy: Copy, tests: list[str]) -> tuple[str, list[str]]:
    log = copy.path / "report"
    for old in copy.path.glob("report.*"):
        old.unlink()
    tools = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **copy.environment,
        "LD_PRELOAD": " ".join(tools),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode=99:log_path={log}",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:log_path={log}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=copy.path, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    reports = [path.read_text() for path in copy.path.glob("report.*")]
    first = [next((line for line in text.splitlines() if "ERROR" in line or "error" in line), text[:200])
             for text in reports]  # fmt: skip
    return (lines[-1] if lines else f"ended with {done.returncode}"), first


def _library(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(done.stdout.strip()).resolve())
