"""Joules of a device, where it has a counter that this process may read."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")
WINDOW = 2.0  # seconds at least; NVML renews its counter every 20 to 100 ms


class Energy(NamedTuple):
    """What was measured.

    Attributes:
        joules: of one step, mean over the window; None where there is no counter.
        source: which counter, or why there is none.
    """

    joules: float | None
    source: str


def measure(step: Callable[[], None], device: str) -> Energy:
    """Joules of `step`, repeated for at least two seconds: of the GPU, or of the processor's package."""
    counter = _nvml() if device == "cuda" else _rapl()
    if isinstance(counter, str):
        return Energy(None, counter)
    read, source = counter
    steps, start, before = 0, time.perf_counter(), read()
    while time.perf_counter() - start < WINDOW:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        steps += 1
    return Energy((read() - before) / steps, f"{source}, mean of {steps} steps")


def _nvml() -> tuple[Callable[[], float], str] | str:
    try:
        import pynvml
    except ImportError:
        return "NVML's counter needs `pip install llmkern[energy]`"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML has no energy counter here ({error})"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3, "NVML counter of the GPU"


def _rapl(root: Path = POWERCAP) -> tuple[Callable[[], float], str] | str:
    """The sum over packages; sub-zones of a package are part of it."""
    zones = sorted(root.glob("intel-rapl:[0-9]")) + sorted(root.glob("intel-rapl:[0-9][0-9]"))
    if not zones:
        return "this machine shows no RAPL counter (/sys/class/powercap)"
    try:
        limits = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        last = [int((zone / "energy_uj").read_text()) for zone in zones]
    except OSError as error:
        return f"the RAPL counter may not be read ({error.strerror}: {zones[0]}/energy_uj)"
    total = 0.0

    def read() -> float:
        nonlocal total
        for i, zone in enumerate(zones):
            now = int((zone / "energy_uj").read_text())
            total += (now - last[i]) % (limits[i] + 1)  # it starts again from 0
            last[i] = now
        return total * 1e-6

    return read, "RAPL counter of the processor packages"
