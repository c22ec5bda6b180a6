"""What a result must say about where it was measured; nothing that names the machine or its owner."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import __version__, _cpu

ROOT = Path(__file__).parent.parent


def describe(device: str) -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _cpu.best(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "llmkern": __version__,
        "date": date.today().isoformat(),
        "commit": commit(),
    }
    if device == "cuda":
        found["runtime"] = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return found


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout, with "+" where it has changes; None outside git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """A name as part of a file name: "AMD EPYC 9R14" becomes "amd-epyc-9r14"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
