"""A copy of the project, to be broken on purpose or compiled with other options."""

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from py_compile import PycInvalidationMode

from llmkern._cpu import INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
ISA = "avx2"  # compiles faster than AVX-512, and every kernel has it
FOLDERS = ("llmkern", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


class Copy:
    """A copy that processes started with `environment` import as `llmkern`, with C++ for `ISA` alone.

    Args:
        flags: more options for the C++ compiler.
    """

    def __init__(self, flags: str = "-O0") -> None:
        self.flags = flags

    def __enter__(self) -> "Copy":
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        others = [f"*_cpu_{isa}.*" for isa in INSTRUCTION_SETS if isa != ISA]
        ignore = shutil.ignore_patterns("__pycache__", "results", *others)
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, self.path / folder, ignore=ignore)
        for file in FILES:
            shutil.copy(ROOT / file, self.path)
        (self.path / "llmkern/kernels").symlink_to(self.path / "kernels")
        # known by its source's hash: what is broken may keep its size, and the second of its time
        compileall.compile_dir(self.path, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        found = {
            **os.environ,
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "ATEN_CPU_CAPABILITY": ISA,
            "OMP_NUM_THREADS": "1",
        }
        found.pop("PYTHONSAFEPATH", None)
        return found

    def compile(self) -> str:
        """Compile what was changed; what the compiler complained of, if it did."""
        environment = {**os.environ, "LLMKERN_ISA": ISA, "LLMKERN_CXXFLAGS": self.flags}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)
        return "" if "C++ kernels are missing" not in done.stderr else done.stdout[-500:]
