"""The hardware catalogue: what a device can do, with a source for every figure.

`hardware.json` holds published figures; `llmkern diagnose` adds what it measured on a machine to a file in
the user's folder.  Rates are dense (no sparsity) and links count one direction, which halves what many
datasheets print.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError

GIB = 2**30
UNITS = {  # field -> key in the file, unit of the file in units of the field
    "flops": ("tflops", 1e12),
    "memory": ("memory_gib", GIB),
    "bandwidth": ("bandwidth_gbs", 1e9),
    "node": ("node", 1),
    "link": ("link_gbs", 1e9),
    "network": ("network_gbs", 1e9),
    "power": ("watts", 1),
    "matmul": ("matmul_tflops", 1e12),
    "busbw": ("busbw_gbs", 1e9),
    "price": ("dollars_per_hour", 1),
    "units": ("multiprocessors", 1),
}


@dataclass(frozen=True)
class Hardware:
    """One device, and how it is connected to others.

    Attributes:
        name: as `--on` takes it.
        title: as people write it.
        flops: dtype ("float32", "tf32", "bfloat16", "float16", "float8", "float4") -> peak dense FLOP/s.
        memory: bytes.
        bandwidth: of memory, bytes/s.
        node: devices that `link` joins.
        link: bytes/s in one direction between devices of a node.
        network: bytes/s in one direction of each device between nodes.
        power: watts at full load; None where nobody says.
        price: dollars an hour; None where there is no list price.
        matmul: dtype -> FLOP/s that a large matrix product was measured to reach.
        busbw: all-reduce bus bandwidth within a node at large payloads in bytes/s, or the name of a curve
            by payload (`collectives.py`); None: never measured.
        units: multiprocessors, over which the tiles of a product are dealt out; 0: unknown.
        sources: file key of a figure ("tflops", "memory_gib", ...) -> where it comes from.
        note: what a reader should know.
        measured: date and versions, for what `diagnose` measured; empty for published figures.
    """

    name: str
    title: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    node: int = 1
    link: float = 0.0
    network: float = 0.0
    power: float | None = None
    price: float | None = None
    matmul: Mapping[str, float] = field(default_factory=dict)
    busbw: float | str | None = None
    units: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    measured: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = field(default=(), repr=False)

    def peak(self, dtype: str = "bfloat16") -> float:
        """Peak dense FLOP/s in `dtype`.

        Raises:
            UserError: the device has no such rate.
        """
        if dtype not in self.flops:
            raise UserError(
                f"dtype is {dtype!r}, which {self.title} has no rate for; expected one of "
                f"{', '.join(self.flops)}"
            )
        return self.flops[dtype]

    def ridge(self, dtype: str = "bfloat16") -> float:
        """FLOP a byte above which arithmetic is the wall, not memory (Williams et al. 2009)."""
        return self.peak(dtype) / self.bandwidth


def from_entry(name: str, entry: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Hardware:
    """A device from its entry in a file; `sources` spells out the short names of sources."""
    figures = {f: _scaled(entry[key], unit) for f, (key, unit) in UNITS.items() if key in entry}
    where = {key: (sources or {}).get(short, short) for key, short in entry.get("sources", {}).items()}
    rest = {key: entry[key] for key in ("note", "measured") if key in entry}
    aliases = tuple(entry.get("aliases", ()))
    return Hardware(name, entry["title"], **figures, **rest, sources=where, aliases=aliases)


def to_entry(device: Hardware) -> dict[str, Any]:
    """The opposite of `from_entry`, in the units of the file."""
    entry: dict[str, Any] = {"title": device.title}
    for name, (key, unit) in UNITS.items():
        value = getattr(device, name)
        if value is not None and value != {} and (value or name != "units"):
            entry[key] = _scaled(value, 1 / unit)
    return {**entry, "note": device.note, "measured": dict(device.measured), "sources": dict(device.sources)}


def _scaled(value: Any, unit: float) -> Any:
    if isinstance(value, Mapping):
        return {key: v * unit for key, v in value.items()}
    return value if value is None or isinstance(value, str) or unit == 1 else value * unit


@cache
def data() -> dict[str, Any]:
    """The catalogue's file as it is: sources, devices, bus-bandwidth curves."""
    return json.loads(Path(__file__).with_name("hardware.json").read_text())


@cache
def published() -> dict[str, Hardware]:
    """Name -> device, of published figures."""
    return {name: from_entry(name, entry, data()["sources"]) for name, entry in data()["devices"].items()}


def catalogue() -> dict[str, Hardware]:
    """Name -> device: the published ones, and those measured by this user."""
    return {**published(), **measured()}


def find(name: str) -> Hardware:
    """The device called `name` or one of its aliases; case, spaces and underscores do not matter.

    Raises:
        UserError: an unknown name, with the nearest known ones.
    """
    devices = catalogue()
    names = {alias: d for d in devices.values() for alias in (d.name, *d.aliases)}
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in names:
        near = get_close_matches(key, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(devices)}"
        raise UserError(f"hardware is {name!r}, which is not in the catalogue; {hint}")
    return names[key]


def measured_file() -> Path:
    """Where measured devices are kept: `$XDG_DATA_HOME/llmkern/hardware.json`, by default in
    `~/.local/share`."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(base) / "llmkern/hardware.json"


def measured() -> dict[str, Hardware]:
    """Name -> device, of those that were measured and saved.

    Raises:
        UserError: the file cannot be read.
    """
    path = measured_file()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["devices"]
        return {name: from_entry(name, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} is not a file of measured hardware ({error!r}); remove it and measure again"
        raise UserError(reason) from error


def save_measured(device: Hardware) -> Path:
    """Add `device` to the user's file, in place of one with the same name; return the file.

    Raises:
        ValueError: `device.measured` is empty: what was not measured does not belong there.
    """
    if not device.measured:
        raise ValueError(f"save_measured: {device.name} has no `measured`; expected at least a date")
    entries = {name: to_entry(d) for name, d in {**measured(), device.name: device}.items()}
    path = measured_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")  # a reader never sees half a file
    fresh.write_text(json.dumps({"devices": entries}, indent=1) + "\n")
    fresh.replace(path)
    return path
