"""Show versions, the processor, the GPU, and which kernels every op has here."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, _cpu, display, machine
from .ops import OPS, implementations
from .ops.dispatch import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", action="store_true", help="also the formula and the source of every op")


def run(args: argparse.Namespace) -> int:
    console = display.make_console()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("llmkern", __version__)
    facts.add_row("torch", torch.__version__)
    facts.add_row("triton", _triton())
    facts.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    facts.add_row("processor", f"{machine.cpu_model()}, {os.cpu_count()} logical cores")
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row("C++ kernels", _cpp())
    facts.add_row("GPU", _gpu())
    console.print(facts, "")
    _show_ops(console)
    if args.ops:
        _describe_ops(console)
    return 0


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed, so there are no kernels for GPUs; `pip install triton` on Linux"


def _cpp() -> str:
    """Which instruction sets have kernels that run here, and which of them does."""
    loaded = {isa: _cpu.load(isa) for isa in _cpu.INSTRUCTION_SETS}
    why = {isa: reason for isa, reason in loaded.items() if isinstance(reason, str)}
    if _cpu.best() in why:
        return f"none: {why[_cpu.best()]}"
    ready = ", ".join(isa for isa in loaded if isa not in why)
    return "\n".join([f"{_cpu.best()} in use, out of {ready}", *why.values()])


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    platform_name = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    names = (f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties)
    return f"{'; '.join(names)}; {platform_name}"


def _show_ops(console: Console) -> None:
    """Which op has which implementation here, and below once for each backend why not."""
    table = Table(title="Ops and their implementations here", title_justify="left")
    for name in ("op", *BACKENDS):
        table.add_column(name)
    reasons: dict[str, None] = {}
    for op in OPS.values():
        kernels = implementations(op)
        states = (kernels[backend] for backend in BACKENDS)
        table.add_row(op.name, *(state if state.startswith("yes") else "no" for state in states))
        reasons |= dict.fromkeys(f"{b}: {k}" for b, k in kernels.items() if not k.startswith("yes"))
    console.print(table, *reasons, sep="\n")


def _describe_ops(console: Console) -> None:
    for op in OPS.values():
        console.print(f"\n{op.name}\n    {op.formula()}\n    {op.source}", soft_wrap=True)
