"""Build llmkern: pure Python plus one small C++ module for each CPU instruction set.

`csrc/bindings.cpp` (pybind11, slow to compile) is compiled once; every other `csrc/*.cpp` once for
each instruction set.  Each set is linked into a module of its own, so that code inlined for AVX-512
can never end up in the generic module.  No torch headers: pip's isolated build works, and one
binary serves every torch.

`LLMKERN_ISA=avx512` builds that set alone, for the quick rebuilds that work on a kernel needs, and
`LLMKERN_CXXFLAGS="-O1 -fsanitize=address"` adds options of the compiler.
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fopenmp -Wall -Wextra"
# GCC 12 takes its own undefined-register intrinsics for uninitialised variables
CXXFLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprfchw"
ISA_FLAGS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": AVX512 + " -mavx512bf16 -mavx512vnni",
}
RULES = """\
rule cc
  command = $cxx {flags} -isystem {pybind11} -isystem {python} $isa -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -fopenmp $in -o $out
"""


class NinjaBuild(build_ext):
    """Compile in one parallel ninja run; without a compiler, install without the C++ kernels.

    setuptools' own parallel build lets extensions overwrite each other's object files.
    """

    def build_extensions(self) -> None:
        try:
            self.run_ninja()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"llmkern: some C++ kernels are missing ({error}); see `llmkern info`", file=sys.stderr)

    def run_ninja(self) -> None:
        import ninja
        import pybind11

        out = Path(self.build_temp).resolve() / "ninja"
        out.mkdir(parents=True, exist_ok=True)
        cxx = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
        python = sysconfig.get_path("include")
        flags = f"{CXXFLAGS} {os.environ.get('LLMKERN_CXXFLAGS', '')}"
        rules = RULES.format(flags=flags, pybind11=pybind11.get_include(), python=python)
        lines = [f"cxx = {cxx}", rules, f"build {out}/bindings.o: cc {ROOT}/csrc/bindings.cpp"]
        for extension in self.extensions:
            isa = extension.name.removeprefix("llmkern._cpu_")
            objects = [f"{out}/bindings.o"]
            for source in extension.sources:
                objects.append(f"{out}/{isa}/{Path(source).stem}.o")
                lines += [f"build {objects[-1]}: cc {ROOT}/{source}", f"  isa = {ISA_FLAGS[isa]}"]
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            lines.append(f"build {target}: link {' '.join(objects)}")
        (out / "build.ninja").write_text("\n".join(lines) + "\n")
        # -k 0: a set that this compiler does not know must not take the others with it
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", out, "-k", "0"], check=True)


def extensions() -> list[Extension]:
    """One module for each instruction set of this machine's processor family."""
    if platform.system() != "Linux":
        return []
    sets = list(ISA_FLAGS) if platform.machine() == "x86_64" else ["generic"]
    sets = os.environ.get("LLMKERN_ISA", " ".join(sets)).split()
    sources = sorted(p.relative_to(ROOT) for p in ROOT.glob("csrc/*.cpp") if p.stem != "bindings")
    return [Extension(f"llmkern._cpu_{isa}", [str(s) for s in sources], optional=True) for isa in sets]


version = re.search(r'__version__ = "(.+)"', (ROOT / "llmkern/__init__.py").read_text())[1]

setup(
    version=version,
    packages=[*find_packages(include=["llmkern", "llmkern.*"]), "llmkern.kernels"],
    # a top-level package named `kernels` would clash with the one of that name on PyPI
    package_dir={"llmkern": "llmkern", "llmkern.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
