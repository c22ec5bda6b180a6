"""What a diagnosis says: rows of ops, walls, memory, rates, remedies."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .energy import Energy
from .predict import Prediction
from .profile import Profile
from .remedies import Remedy
from .trace import Call

WALLS = ("compute", "memory", "launch", "communication", "data")
CONVENTION = (
    "MFU counts the products of forward and backward, attention over all pairs of positions (a causal mask "
    "is not subtracted), nothing computed twice (PaLM, arXiv:2204.02311, app. B); HFU counts every operation "
    "that ran; both against the arithmetic ceiling measured on this machine"
)


@dataclass
class Row:
    """All calls of one op, for modules of one place in the model's pattern, in one phase.

    Attributes:
        module: path with every number as *, such as "transformer.h.*.mlp".
        op: name; phase: of `trace.PHASES`.
        calls: how many.
        seconds: in all.
        flops, bytes: in all; intensity: FLOPs a byte.
        rate: FLOP/s.
        ceiling: least possible time on this machine, as part of the time it took.
        wall: what binds it, of WALLS.
    """

    module: str
    op: str
    phase: str
    calls: int
    seconds: float
    flops: float
    bytes: float
    ceiling: float
    wall: str

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def rate(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "intensity": self.intensity, "rate": self.rate}


def rows_of(calls: Iterable[Call], profile: Profile) -> list[Row]:
    """The rows, longest first."""
    groups: dict[tuple[str, str, str], list[Call]] = {}
    for call in calls:
        module = re.sub(r"\b\d+\b", "*", call.path)
        groups.setdefault((module, call.op, call.phase), []).append(call)
    rows = []
    for (module, op, phase), group in groups.items():
        seconds, flops, moved = (
            sum(getattr(c, name) for c in group) for name in ("seconds", "flops", "bytes")
        )
        least = sum(profile.bound(c).seconds for c in group)
        by_wall: dict[str, float] = {}
        for c in group:
            wall = profile.wall(c)
            by_wall[wall] = by_wall.get(wall, 0.0) + c.seconds
        wall = max(by_wall, key=by_wall.__getitem__)
        ceiling = least / seconds if seconds else 0.0
        rows.append(Row(module, op, phase, len(group), seconds, flops, moved, ceiling, wall))
    return sorted(rows, key=lambda row: -row.seconds)


@dataclass
class Diagnosis:
    """One step of a model on this machine.  `print` shows it; `save_html` writes it as a page.

    Attributes:
        name: of the model; mode: "train" or "inference"; dtype: of products; parameters: how many.
        tokens: of one step.
        profile: of the machine.
        seconds: median of steps that were not traced; best: the shortest.
        data_seconds: waiting for the batch, in the traced step.
        rows: ops, longest first.
        walls: wall -> seconds of the step.
        parts: bytes by part at the peak of memory; timeline: the same for every call; phases: phase -> call
            with which it begins.
        allocated: bytes that the allocator of a GPU counted at its peak; None on a CPU.
        prediction: made before the step ran.
        energy: joules of a step, or why they are unknown.
        remedies: what would change, the largest gain first.
        swap: what `apply` swapped; after: the same diagnosis afterwards.
        notes: what was assumed.
    """

    name: str
    mode: str
    dtype: str
    parameters: int
    tokens: int
    profile: Profile
    seconds: float
    best: float
    data_seconds: float
    rows: list[Row]
    walls: dict[str, float]
    flops: float
    model_flops: float
    parts: dict[str, int]
    timeline: list[dict[str, int]]
    phases: dict[str, int]
    allocated: int | None
    prediction: Prediction
    energy: Energy
    remedies: list[Remedy] = field(default_factory=list)
    swap: str = ""
    after: "Diagnosis | None" = None
    notes: list[str] = field(default_factory=list)

    def share(self, seconds: float) -> float:
        """`seconds` of ops as part of the traced step."""
        traced = sum(row.seconds for row in self.rows) + self.data_seconds
        return seconds / max(self.seconds, traced)

    @property
    def peak_bytes(self) -> int:
        """Of all tensors together."""
        return self.allocated or sum(self.parts.values())

    @property
    def peak_rate(self) -> float:
        """The arithmetic ceiling in the dtype of products, FLOP/s."""
        import torch

        return self.profile.peak(getattr(torch, self.dtype))

    @property
    def mfu(self) -> float:
        return self.model_flops / self.seconds / self.peak_rate

    @property
    def hfu(self) -> float:
        return self.flops / self.seconds / self.peak_rate

    @property
    def wall(self) -> str:
        """The wall at which most of the step's time is spent."""
        return max(self.walls, key=self.walls.__getitem__)

    @property
    def joules_per_token(self) -> float | None:
        return None if self.energy.joules is None else self.energy.joules / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; times in seconds, memory in bytes, rates in FLOP/s."""
        whole = {
            f: getattr(self, f)
            for f in (
                "name", "mode", "dtype", "parameters", "tokens", "seconds", "best", "data_seconds", "walls",
                "wall", "flops", "model_flops", "mfu", "hfu", "parts", "peak_bytes", "timeline", "phases",
                "joules_per_token", "swap", "notes",
            )
        }  # fmt: skip
        return {
            **whole,
            "convention": CONVENTION,
            "machine": self.profile.about,
            "ceilings": str(self.profile.ceilings),
            "launch_seconds": self.profile.launch,
            "rows": [row.to_dict() for row in self.rows],
            "prediction": self.prediction.to_dict(),
            "energy": self.energy._asdict(),
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "after": None if self.after is None else self.after.to_dict(),
        }

    def __str__(self) -> str:
        from .terminal import as_text

        return as_text(self)

    def save_html(self, path: Any) -> None:
        """Write one page that needs nothing else: no network, no script, no other file.

        Raises:
            UserError: `path` cannot be written to.
        """
        from .page import save

        save(self, path)
