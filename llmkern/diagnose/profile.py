"""What a machine can do, measured: its ceilings, and how close to them each op comes at each size."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ceilings import Bound, Ceilings, dtype_name
from ..machine import slug
from ..ops.op import Cost
from .costs import is_product
from .trace import Call

NEAR = 0.35  # width, in the logarithm of the least time, of the sizes that speak for another
FAR = 1e-6  # weight of sizes beyond, which speak where there are no others
Points = dict[str, list[tuple[float, float]]]  # op -> (least seconds, part of the ceiling reached)


@dataclass
class Profile:
    """A machine.

    Attributes:
        about: hardware, versions and date (`machine.describe`).
        device: "cpu" or "cuda".
        ceilings: what it can do at best.
        launch: seconds that a call of an op costs beside its work: Python, autograd, dispatch.
        fresh: seconds for each byte of memory that comes from the system, and not from an allocator.
        points: dtype -> op -> measured parts of the ceiling.
    """

    about: dict[str, Any]
    device: str
    ceilings: Ceilings
    launch: float = 0.0
    fresh: float = 0.0
    points: dict[str, Points] = field(default_factory=dict)

    def bound(self, call: Call) -> Bound:
        """The least time of a call here."""
        return self.ceilings.bound(Cost(call.flops, call.bytes), self._dtype(call))

    def wall(self, call: Call) -> str:
        """What holds a call back: the largest of its least times for arithmetic, memory and launch."""
        if call.collective:
            return "communication"
        bound = self.bound(call)
        return "launch" if self.launch > bound.seconds else bound.limit

    def seconds(self, call: Call) -> float:
        """How long a call takes here, from its least time and the part of the ceiling that its op reaches.

        The part is the mean of the logarithms over what was measured of that op, weighed by how near in size
        it was.  Where all of it is further than 20 times in size, or there is none, other products speak for
        a product of that size, and what is no product for one that is none.
        """
        bound = self.bound(call).seconds
        if not bound:
            return 0.0
        table = self.points.get(dtype_name(call.dtype)) or self.points.get("float32", {})
        weighed = [(_near(bound, least) + _far(bound, least), part) for least, part in table.get(call.op, [])]
        if sum(weight for weight, _ in weighed) < 10 * FAR:
            weighed += self._others(table, is_product(call.op), bound)
        total = sum(weight for weight, _ in weighed)
        if not total:
            return bound + call.fresh * self.fresh
        mean = sum(weight * math.log(part) for weight, part in weighed) / total
        return bound / math.exp(mean) + call.fresh * self.fresh

    def _others(self, table: Points, product: bool, bound: float) -> list[tuple[float, float]]:
        """(weight, part) of all alike ops; together they weigh what an op's own do at 20 times the size."""
        alike = [point for op, points in table.items() if is_product(op) == product for point in points]
        weights = [_near(bound, least) + _far(bound, least) for least, _ in alike]
        total = sum(weights) or 1.0
        return [(_far(20.0, 1.0) * weight / total, part) for weight, (_, part) in zip(weights, alike)]

    def _dtype(self, call: Call) -> torch.dtype:
        return call.dtype if dtype_name(call.dtype) in self.ceilings.flops else torch.float32

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s at best in `dtype`."""
        return max(self.ceilings.flops[dtype_name(dtype)].values())

    def save(self) -> Path:
        """Keep it for the next time; return the file."""
        path = profile_file(self.about, self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        fresh.replace(path)
        return path

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        ceilings = {
            "flops": self.ceilings.flops,
            "bandwidth": self.ceilings.bandwidth,
            "cold": self.ceilings.cold,
        }
        return {
            "about": self.about,
            "device": self.device,
            "ceilings": ceilings,
            "launch": self.launch,
            "fresh": self.fresh,
            "points": self.points,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Profile":
        """The opposite of `to_dict`."""
        ceilings = data["ceilings"]
        bandwidth = {int(footprint): rates for footprint, rates in ceilings["bandwidth"].items()}
        points = {
            dtype: {op: [tuple(p) for p in found] for op, found in table.items()}
            for dtype, table in data["points"].items()
        }
        found = Ceilings(ceilings["flops"], bandwidth, ceilings["cold"])
        return cls(data["about"], data["device"], found, data["launch"], data["fresh"], points)


def profile_file(about: dict[str, Any], device: str) -> Path:
    """Where the profile of such a machine is kept: `$XDG_DATA_HOME/llmkern`, else `~/.local/share/llmkern`.

    Its name has all that changes the figures: hardware, threads, torch, llmkern.
    """
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    parts = (about["device"], device, f"{about['threads']} threads", about["torch"], about["llmkern"])
    return base / "llmkern" / f"profile-{slug(' '.join(map(str, parts)))}.json"


def load(about: dict[str, Any], device: str) -> Profile | None:
    """The profile that was kept of such a machine, if it can be read."""
    try:
        return Profile.from_dict(json.loads(profile_file(about, device).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def points_of(calls: Iterable[Call], profile: Profile) -> Points:
    """Op -> (least seconds, part of the ceiling reached) of measured calls."""
    found: Points = {}
    for call in calls:
        least = profile.bound(call).seconds
        seconds = max(call.seconds - call.fresh * profile.fresh, least / 2)
        if least:
            found.setdefault(call.op, []).append((least, least / seconds))
    return found


def _near(a: float, b: float) -> float:
    """Weight of a measurement at size `b` for size `a`."""
    return math.exp(-0.5 * (math.log(a / b) / NEAR) ** 2)


def _far(a: float, b: float) -> float:
    return FAR * min(a / b, b / a)
