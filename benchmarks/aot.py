"""python -m benchmarks.aot: compile every Triton kernel for GPUs that are not here, and check the code.

The real launchers run on meta tensors, which have shapes but no data, under a driver that only
names its GPU; so what is compiled is what a launch on that GPU would compile.  A kernel fails if it
spills registers, wants more shared memory than the GPU has, misses the tensor cores in 16 bits, or
uses TF32 where float32 was promised.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from llmkern.kernels import launch as launcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from llmkern.ops.dispatch import find
from llmkern.ops.op import OPS, Make, Op, Sample, differentiable


class Target(NamedTuple):
    """A GPU architecture, and the shared memory that one of its blocks may have, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


# NVIDIA CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA ISA, LDS
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}
MORE_TARGETS = {
    "sm_86": Target("cuda", 86, 32, 101376),
    "sm_89": Target("cuda", 89, 32, 101376),
    "sm_120": Target("cuda", 120, 32, 101376),
    "gfx950": Target("hip", "gfx950", 64, 163840),
}
DTYPES = ("bfloat16", "float16", "float32")
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_smfmac)")
TF32 = re.compile(r"\.tf32|xf32")


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel on one target; `problems` is empty if all is well."""

    target: str
    dtype: str
    kernel: str
    case: str
    warps: int
    registers: int
    spills: int
    shared: int
    instruction: str
    problems: tuple[str, ...]


class Driver:
    """Stands for the driver of a GPU that is not here: it knows its target and nothing else."""

    def __init__(self, index: int, target: Target):
        from triton.backends.compiler import GPUTarget

        self.index = index  # kernels are cached by device: a number for each target
        self.target = GPUTarget(target.backend, target.arch, target.warp)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def cases(op: Op, dtype: torch.dtype) -> Iterator[Sample]:
    """The op's benchmarks, and what they leave out of its kernels; made without data."""
    yield from op.benchmarks(Make(dtype))
    yield from op.variants(Make(dtype))


def on_meta(op: Op, sample: Sample) -> Sample:
    """The sample with meta tensors of the same strides in place of fake ones."""
    wanted = {id(t) for t in differentiable(op, sample) if t is not sample.kwargs.get("attn_mask")}

    def convert(x: Tensor) -> Tensor:
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return meta.requires_grad_(id(x) in wanted)

    return Sample(sample.label, *tree_map_only(Tensor, convert, (sample.args, sample.kwargs)))


@contextmanager
def compiling(
    index: int, target: Target, found: Callable[[Any, str], None], skip: Callable[[str], bool]
) -> Iterator[None]:
    """Inside the `with` block a launch compiles for `target` and calls found(kernel, its name)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        if not skip(self.__name__):
            found(launch(self, *args, grid=grid, warmup=True, **kwargs), self.__name__)

    driver.set_active(Driver(index, target))
    most_warps = 4 if target.backend == "hip" else 32
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launcher, "MOST_WARPS", most_warps):
        yield


@contextmanager
def only_triton(op: Op) -> Iterator[None]:
    """Inside the `with` block both halves of `op` run their Triton launchers, whatever the device."""

    def half(name: str, outputs: Callable) -> Callable:
        kernel = find(op, name, "triton")

        def run(*args):
            outs = outputs(*args)
            kernel(*args, *(outs if isinstance(outs, tuple) else () if outs is None else (outs,)))
            return outs

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(op, "fwd", half("fwd", op.outputs)))
        if op.gradients:
            stack.enter_context(mock.patch.object(op, "bwd", half("bwd", op.outputs_bwd)))
        yield


def compile_op(name: str, dtype: str, op: str, once: bool = False) -> list[Compiled]:
    """Compile both halves of `op` in `dtype` for the target `name`; one result for each kernel.

    Args:
        once: only the first launch of each kernel function, in place of every case.
    """
    targets = {**TARGETS, **MORE_TARGETS}
    results: dict[int, Compiled] = {}
    with FakeTensorMode():
        samples = list(cases(OPS[op], getattr(torch, dtype)))
    for sample in samples:
        sample = on_meta(OPS[op], sample)
        case = f"{op} {sample.label}"

        def found(kernel: Any, function: str, case: str = case) -> None:
            if id(kernel) not in results:  # Triton's cache keeps every kernel alive
                results[id(kernel)] = inspect(kernel, function, name, targets[name], dtype, case)

        def skip(function: str) -> bool:
            return once and any(row.kernel == function for row in results.values())

        with compiling(list(targets).index(name), targets[name], found, skip), only_triton(OPS[op]):
            out = OPS[op].public(*sample.args, **sample.kwargs)
            if OPS[op].gradients:
                (out[0] if isinstance(out, tuple) else out).sum().backward()
    return list(results.values())


def inspect(kernel: Any, function: str, name: str, target: Target, dtype: str, case: str) -> Compiled:
    """Read the compiled code."""
    assembly = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spills = (nvidia_usage if target.backend == "cuda" else amd_usage)(kernel)
    found = TENSOR_CORE.search(assembly)
    shared = kernel.metadata.shared
    problems = []
    if spills:
        problems.append(f"{spills} spills")
    if shared > target.shared:
        problems.append(f"{shared} bytes of shared memory, {name} has {target.shared}")
    if dtype != "float32" and "tt.dot" in kernel.asm["ttir"] and not found:
        problems.append("no tensor-core instruction")
    if dtype == "float32" and TF32.search(assembly):
        problems.append("TF32 in float32")
    return Compiled(
        name, dtype, function, case, kernel.metadata.num_warps, registers, spills, shared,
        found[1] if found else "", tuple(problems),
    )  # fmt: skip


def nvidia_usage(kernel: Any) -> tuple[int, int]:
    """Registers of a thread, and how many instructions of the machine code spill or reload one."""
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__file__).parent / "bin"

    def tool(*command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = (str(folder / command[0]), *command[1:], file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage"))[1])
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", tool("nvdisasm", "-c")))


def amd_usage(kernel: Any) -> tuple[int, int]:
    """Vector registers of a thread, and how many were spilled."""
    count = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
    return count["vgpr_count"], count["vgpr_spill_count"]


def compile_in_parallel(
    targets: Sequence[str], dtypes: Sequence[str], ops: Sequence[str], once: bool = False
) -> list[Compiled]:
    """`compile_op` for every target, dtype and op, on all cores."""
    jobs = [(target, dtype, op, once) for target in targets for dtype in dtypes for op in ops]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return [row for rows in pool.starmap(compile_op, jobs, chunksize=1) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to compile (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--target", nargs="+", choices=[*TARGETS, *MORE_TARGETS], default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help=f"also for {', '.join(MORE_TARGETS)}")
    parser.add_argument("--once", action="store_true", help="only the first launch of each kernel")
    parser.add_argument("--failed", action="store_true", help="print only kernels with a problem")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"unknown op {', '.join(unknown)}, expected one of {', '.join(OPS)}")
    targets = [*TARGETS, *MORE_TARGETS] if args.all else args.target
    torch.set_num_threads(1)
    rows = compile_in_parallel(targets, args.dtype, args.ops or list(OPS), args.once)
    for row in rows:
        if row.problems or not args.failed:
            print(
                f"{row.target:7} {row.dtype:9} {row.kernel:22} {row.case:38} warps {row.warps:2} "
                f"registers {row.registers:3} shared {row.shared:6} {row.instruction:16} "
                + ("; ".join(row.problems) or "ok")
            )
    failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} kernels compiled for {', '.join(targets)}: {failed} with a problem")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
