"""Compile Triton kernels for GPUs that are not here, exactly as a launch there would.

The real launchers run on meta tensors, which have shapes but no data, under a driver that only names
its GPU.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from llmkern.kernels import launch as launcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from llmkern.ceilings import dtype_name
from llmkern.ops.dispatch import find
from llmkern.ops.op import OPS, Make, Op, Sample, differentiable

from . import aot_code


class Target(NamedTuple):
    """A GPU architecture.

    Attributes:
        shared: bytes of shared memory that one block may have.
        tensor: the tensor-core instruction that products of 64 rows and more must use in 16 bits.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    tensor: str


# NVIDIA CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA ISA, LDS
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 232448, "wgmma.mma_async"),
    "sm_100": Target("cuda", 100, 32, 232448, "tcgen05.mma"),
    "gfx942": Target("hip", "gfx942", 64, 65536, "v_mfma"),
}
MORE_TARGETS = {
    "sm_86": Target("cuda", 86, 32, 101376, "mma.sync"),
    "sm_89": Target("cuda", 89, 32, 101376, "mma.sync"),
    "sm_103": Target("cuda", 103, 32, 232448, "tcgen05.mma"),
    "sm_120": Target("cuda", 120, 32, 101376, "mma.sync"),
    "gfx950": Target("hip", "gfx950", 64, 163840, "v_mfma"),
}
ALL_TARGETS = {**TARGETS, **MORE_TARGETS}
DTYPES = ("bfloat16", "float16", "float32")
GLUON = {"attention": ("sm_90",)}  # ops with kernels of their own for some targets
IN_FLIGHT = 64  # exponentials that a thread makes of a block of 64 x 128 scores
TILE_ROWS = 64  # that wgmma and tcgen05 need
_DOT = re.compile(r"tt\.dot .*-> tensor<(\d+)x(\d+)xf32")


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel on one target; `problems` is empty if all is well."""

    target: str
    dtype: str
    op: str
    kernel: str
    case: str
    warps: int
    shared: int
    code: aot_code.Code
    problems: tuple[str, ...]
    first: bool  # of its function for this op: its default configuration


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
        once: only the first launch of each kernel function, its default, in place of every case.
    """
    results: dict[int, Compiled] = {}
    with FakeTensorMode():
        samples = list(cases(OPS[op], getattr(torch, dtype)))
    for sample in samples:
        compile_case(name, dtype, op, sample, results, lambda seen: once and seen)
    return list(results.values())


def compile_sample(
    name: str, op: str, sample: Callable[[Make], Sample], dtype: torch.dtype, functions: Sequence[str]
) -> list[Compiled]:
    """The first launch of each of these kernel functions on one sample."""
    results: dict[int, Compiled] = {}
    with FakeTensorMode():
        made = sample(Make(dtype))
    compile_case(name, dtype_name(dtype), op, made, results, lambda seen: seen, functions)
    return list(results.values())


def compile_case(
    name: str, dtype: str, op: str, sample: Sample, results: dict[int, Compiled],
    enough: Callable[[bool], bool], functions: Sequence[str] = (),
) -> None:  # fmt: skip
    """Add the kernels of one sample to `results`, those in `functions` or all.

    Args:
        enough: whether a launch is left out, by whether its function has been seen.
    """

    def seen(function: str) -> bool:
        return any(row.kernel == function for row in results.values())

    def found(kernel: Any, function: str) -> None:
        if id(kernel) not in results:  # Triton's cache keeps every kernel alive
            first = not seen(function)
            results[id(kernel)] = inspect(kernel, function, name, dtype, op, sample.label, first)

    def skip(function: str) -> bool:
        return enough(seen(function)) or bool(functions and function not in functions)

    index, on = list(ALL_TARGETS).index(name), on_meta(OPS[op], sample)
    for gluon in "01":  # without and with the kernels that only this GPU has
        with (
            mock.patch.dict(os.environ, LLMKERN_GLUON=gluon),
            compiling(index, ALL_TARGETS[name], found, skip),
            only_triton(OPS[op]),
        ):
            out = OPS[op].public(*on.args, **on.kwargs)
            if OPS[op].gradients:
                (out[0] if isinstance(out, tuple) else out).sum().backward()
        if name not in GLUON.get(op, ()):
            break


def inspect(kernel: Any, function: str, name: str, dtype: str, op: str, label: str, first: bool) -> Compiled:
    """Read the compiled code and judge it."""
    code, target = aot_code.read(kernel), ALL_TARGETS[name]
    shared, ir = kernel.metadata.shared, kernel.asm.get("ttir")  # Gluon has none
    problems = []
    if code.spills:
        problems.append(f"{code.spills} spills")
    if shared > target.shared:
        problems.append(f"{shared} bytes of shared memory, {name} has {target.shared}")
    if ir is None:
        problems += gluon_problems(kernel, code)
    elif dtype != "float32" and "tt.dot" in ir:
        tall = all(int(rows) >= TILE_ROWS for rows, _ in _DOT.findall(ir))
        if not code.tensor:
            problems.append("no tensor-core instruction")
        elif tall and kernel.metadata.num_warps >= 4 and code.tensor != target.tensor:
            problems.append(f"{code.tensor} in place of {target.tensor}")
    if dtype == "float32" and aot_code.TF32.search(kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]):
        problems.append("TF32 in float32")
    if code.atomics:
        problems.append(f"{code.atomics} atomic instructions")
    warps = kernel.metadata.num_warps
    return Compiled(name, dtype, op, function, label, warps, shared, code, tuple(problems), first)


def gluon_problems(kernel: Any, code: aot_code.Code) -> Iterator[str]:
    """A Gluon kernel loads by TMA, multiplies by wgmma, and makes exponentials while products run."""
    if code.tensor != "wgmma.mma_async" or "UTMALDG" not in aot_code.sass(kernel):
        yield "no wgmma or no TMA"
    counts = aot_code.exponentials_in_flight(kernel)
    if not counts or min(counts) < IN_FLIGHT:
        yield f"{counts} exponentials while a product runs, expected {IN_FLIGHT} for each loop"


def compile_in_parallel(
    targets: Sequence[str], dtypes: Sequence[str], ops: Sequence[str], once: bool = False
) -> Iterator[list[Compiled]]:
    """`compile_op` for every target, dtype and op, on all cores, as they are done."""
    jobs = [(target, dtype, op, once) for target in targets for dtype in dtypes for op in ops]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        yield from pool.imap(_compile_job, jobs, chunksize=1)


def _compile_job(job: tuple[str, str, str, bool]) -> list[Compiled]:
    torch.set_num_threads(1)
    return compile_op(*job)
