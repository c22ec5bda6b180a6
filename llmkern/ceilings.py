"""What this machine can do at best, measured on it in the same run: arithmetic and memory rates."""

import time
from dataclasses import astuple, dataclass, field
from types import ModuleType

import torch

from . import _cpu
from .clock import Call, Clock
from .ops.op import Cost

FOOTPRINTS = [2**k for k in range(19, 30)]  # bytes touched: from a core's cache to memory
MATMUL = {"cpu": 1536, "cuda": 8192}  # side of the square product
Rates = dict[str, float]  # how it was measured -> FLOP/s or bytes/s


@dataclass(frozen=True)
class Bound:
    """The work of a call and the least seconds it can take here: on arithmetic, on memory, and in all.

    `seconds` is the roofline, max(compute, memory) of each half, summed over the halves
    (Williams et al. 2009, doi:10.1145/1498765.1498785).
    """

    flops: float = 0.0
    bytes: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Bound") -> "Bound":
        return Bound(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @property
    def limit(self) -> str:
        """The wall: "compute" or "memory"."""
        return "compute" if self.compute >= self.memory else "memory"


@dataclass
class Ceilings:
    """Measured rates, each by every way that was tried; the ceiling is the best of them.

    Attributes:
        flops: dtype -> FLOP/s.
        bandwidth: footprint in bytes -> bytes/s, reads and writes counted.
        cold: caches are emptied before each call, so only the largest footprint counts.
    """

    flops: dict[str, Rates] = field(default_factory=dict)
    bandwidth: dict[int, Rates] = field(default_factory=dict)
    cold: bool = False

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of each rate."""
        return Ceilings(
            _best_rates(self.flops, other.flops), _best_rates(self.bandwidth, other.bandwidth), self.cold
        )

    def bound(self, cost: Cost, dtype: torch.dtype) -> Bound:
        """The roofline for work of this `cost`."""
        compute = cost.flops / max(self.flops[dtype_name(dtype)].values())
        memory = cost.bytes / self.rate(max(self.bandwidth) if self.cold else cost.bytes)
        return Bound(cost.flops, cost.bytes, compute, memory, max(compute, memory))

    def rate(self, touched: float) -> float:
        """Bytes/s of memory when so many bytes are touched.

        That of the next smaller footprint, so that the ceiling is never flattering; at least that of
        every larger one.
        """
        base = max((f for f in self.bandwidth if f <= touched), default=min(self.bandwidth))
        return max(rate for f, rates in self.bandwidth.items() if f >= base for rate in rates.values())

    def __str__(self) -> str:
        parts = [f"{dtype} {max(rates.values()) / 1e9:,.0f} GFLOP/s" for dtype, rates in self.flops.items()]
        parts.append(f"memory {self.rate(max(self.bandwidth)) / 1e9:,.1f} GB/s")
        if not self.cold:
            parts.append(f"innermost cache {self.rate(0) / 1e9:,.0f} GB/s")
        return ", ".join(parts)


def _best_rates(a: dict, b: dict) -> dict:
    return {
        key: {
            way: max(rates.get(way, 0) for rates in (a.get(key, {}), b.get(key, {})))
            for way in a.get(key, {}) | b.get(key, {})
        }
        for key in a | b
    }


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def measure(device: str, dtypes: list[torch.dtype], seconds: float = 0.3, cold: bool = False) -> Ceilings:
    """Measure the ceilings of `device`, each rate for `seconds`."""
    clock, module = Clock(device), _module(device)
    found = Ceilings(cold=cold)
    found.flops = measure_flops(device, dtypes, seconds)
    for footprint in FOOTPRINTS[-1:] if cold else FOOTPRINTS:
        found.bandwidth[footprint] = _bandwidth(clock, device, module, footprint, seconds)
    return found


def measure_flops(device: str, dtypes: list[torch.dtype], seconds: float = 0.3) -> dict[str, Rates]:
    """Measure the arithmetic rates of `device` alone: dtype -> how -> FLOP/s."""
    clock, module = Clock(device), _module(device)
    found = {}
    for dtype in dtypes:
        found[dtype_name(dtype)] = rates = {"matmul": _matmul(clock, device, dtype, seconds)}
        if module is not None:
            rates["registers"] = _registers(clock, module, dtype, seconds)
    return found


def _module(device: str) -> ModuleType | None:
    """The C++ kernels of a CPU; if they were not built, torch's own rates remain."""
    module = _cpu.load(_cpu.best()) if device == "cpu" else None
    return None if isinstance(module, str) else module


def _best(clock: Clock, call: Call, work: float, seconds: float) -> float:
    """work / the shortest time of `call` in several goes."""
    clock(call)
    end, least = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        least = min(least, clock(call))
    return work / least if least < float("inf") else work / clock(call)


def _matmul(clock: Clock, device: str, dtype: torch.dtype, seconds: float) -> float:
    n = MATMUL[device]
    a, b = (_noise(n * n, device).view(n, n).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _best(clock, lambda: torch.mm(a, b, out=out), 2 * n**3, seconds)


def _noise(n: int, device: str) -> torch.Tensor:
    """(n,) random numbers; the generator that a training draws from is left alone."""
    return torch.randn(n, device=device, generator=torch.Generator(device).manual_seed(0))


def _registers(clock: Clock, module: ModuleType, dtype: torch.dtype, seconds: float) -> float:
    """csrc/ceilings.cpp; a dtype without arithmetic of its own computes in float32."""
    loops = [module.peak_bf16_dot] if dtype == torch.bfloat16 else []
    result = torch.zeros(2, dtype=torch.float64)
    for loop in (*loops, module.peak_fma):
        loop(1_000_000, result)
        if result[1]:  # this processor has the instruction
            break
    return _best(clock, lambda: loop(1_000_000, result), float(result[1]), seconds)


def _bandwidth(clock: Clock, device: str, module: ModuleType | None, footprint: int, seconds: float) -> Rates:
    n = footprint // 8  # float32 elements of one half
    both = _noise(2 * n, device)
    source, target = both[:n], both[n:]
    times = max(1, FOOTPRINTS[-1] // footprint // 8)  # inside the kernel, so that its start does not count
    result = torch.zeros(2, dtype=torch.float64)
    ways: dict[str, tuple[Call, int]] = {"torch copy": (lambda: target.copy_(source), 1)}
    if module is not None:
        ways["read"] = (lambda: module.stream_read(both, times, result), times)
        ways["copy"] = (lambda: module.stream_copy(source, times, target), times)
    return {name: _best(clock, call, footprint * goes, seconds / 3) for name, (call, goes) in ways.items()}
