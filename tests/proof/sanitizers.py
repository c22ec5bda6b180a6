"""The C++ kernels under GCC's sanitizers of memory, undefined behaviour and threads, in copies made for them.

The tools are libraries that must be loaded before Python's own; they write their reports to files, since
pytest swallows what a dying process prints.  PyTorch, which is not compiled for them, runs on one thread.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from proof.copies import Copy

LINES = "-O0 -g1 -fno-omit-frame-pointer"  # compiles in half the time, and the tests take no longer


@dataclass(frozen=True)
class Tool:
    """A sanitizer, or two that go together.

    Attributes:
        flags: of the compiler.
        libraries: that are loaded first.
        options: environment variables of the tool; `{log}` is where reports go.
        tests: arguments of pytest.
        fault: what is planted.
        planted: (file, text, new text) of it.
        seen_by: tests that meet the fault.
    """

    name: str
    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    tests: list[str]
    fault: str
    planted: tuple[str, str, str]
    seen_by: list[str]


MEMORY = Tool(
    "AddressSanitizer and UndefinedBehaviorSanitizer",
    f"{LINES} -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    ("libasan.so", "libubsan.so", "libstdc++.so"),
    {
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:log_path={log}",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:log_path={log}",
    },
    ["tests/ops", "-k", "cpp:avx2 and not compile and not memory"],
    "one vector read beyond a row",
    (
        "csrc/softmax.cpp",
        "m = max(m, keep_first(load(x + i, k), k, top));",
        "m = max(m, load(x + i, W));",
    ),
    ["tests/ops/test_softmax.py", "-k", "cpp:avx2 and values", "-n", "0"],
)
THREADS = Tool(
    "ThreadSanitizer, on 4 threads",
    f"{LINES} -fsanitize=thread",
    ("libtsan.so", "libstdc++.so"),
    {"TSAN_OPTIONS": "exitcode=99:report_signal_unsafe=0:ignore_noninstrumented_modules=1:log_path={log}"},
    ["tests/ops/test_numbers.py", "tests/models/test_decoder.py", "-k", "cpp:avx2 or decoder"],
    "nobody waits for what the others write",
    (
        "csrc/decoder.cpp",
        "  team.barrier();\n  read(s.h, s.hidden, wide);",
        "  read(s.h, s.hidden, wide);",
    ),
    ["tests/models/test_decoder.py"],
)
TOOLS = (MEMORY, THREADS)


class Found(NamedTuple):
    """What came of it."""

    tests: str  # pytest's last line
    reports: list[str]  # the first lines of the tool's reports
    planted: bool  # whether the planted fault was reported


def sanitize(tool: Tool) -> Found:
    """Build, test, plant a fault and test again.

    Raises:
        RuntimeError: it does not compile.
    """
    with Copy(tool.flags) as copy:
        if complaint := copy.compile():
            raise RuntimeError(complaint)
        tests, reports = _run(copy, tool, tool.tests)
        file, old, new = tool.planted
        text = (copy.path / file).read_text()
        assert text.count(old) == 1, f"the planted fault does not fit {file}"
        (copy.path / file).write_text(text.replace(old, new))
        copy.compile()
        _, planted = _run(copy, tool, tool.seen_by)
    return Found(tests, reports, bool(planted))


def _run(copy: Copy, tool: Tool, tests: list[str]) -> tuple[str, list[str]]:
    log = copy.path / "report"
    for old in copy.path.glob("report.*"):
        old.unlink()
    environment = {
        **copy.environment,
        "LD_PRELOAD": " ".join(_library(name) for name in tool.libraries),
        **{name: value.format(log=log) for name, value in tool.options.items()},
    }
    processes = ["-n", str(os.cpu_count()), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *processes, *tests]
    # the tools keep their notes at fixed addresses, where a randomised layout may have put something
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), *command]
    done = subprocess.run(command, cwd=copy.path, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    reports = [_headline(path.read_text(errors="replace")) for path in sorted(copy.path.glob("report.*"))]
    return (lines[-1] if lines else f"ended with {done.returncode}"), reports


def _headline(report: str) -> str:
    words = ("ERROR", "WARNING", "error")
    return next((line for line in report.splitlines() if any(word in line for word in words)), report[:200])


def _library(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(done.stdout.strip()).resolve())
