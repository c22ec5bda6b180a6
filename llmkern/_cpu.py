"""Find and load the C++ kernels: one extension module for each instruction set of the processor."""

import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch  # before the extension: its OpenMP runtime must be the one that both share

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")


@cache
def best() -> str:
    """The fastest instruction set that this processor has and torch is allowed to use.

    Obeys `ATEN_CPU_CAPABILITY` (default, avx2 or avx512) as torch does.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        bf16 = "avx512_bf16" in cpu_flags() and not isinstance(load("avx512_bf16"), str)
        return "avx512_bf16" if bf16 else "avx512"
    return "avx2" if capability == "AVX2" else "generic"


@cache
def cpu_flags() -> frozenset[str]:
    """The feature flags of this processor, where the system tells them (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def supported(isa: str) -> bool:
    """Whether this processor can run the kernels built for `isa`."""
    needs = {
        "generic": (),
        "avx2": ("avx2", "fma", "f16c"),
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        "avx512_bf16": ("avx512_bf16",),
    }[isa]
    return cpu_flags().issuperset(needs)


@cache
def load(isa: str) -> ModuleType | str:
    """The kernels built for `isa`, or one sentence on why they are not there."""
    folder = Path(__file__).parent
    paths = [p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_cpu_{isa}{suffix}").exists()]
    if not paths:
        return (
            f"the C++ kernels for {isa} on {platform.machine()} are not built; install a C++17 compiler "
            "(g++ 11 or later) and run `pip install -v -e .` again"
        )
    if not supported(isa):
        return f"this processor has no {isa}"
    # the init function is PyInit__cpu in every set; names that differ before it, as pybind11 keeps one
    # module for each name
    spec = spec_from_file_location(f"{isa}._cpu", paths[0])
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return f"the C++ kernels for {isa} cannot be loaded ({error}); run `pip install -v -e .` again"
    return module
