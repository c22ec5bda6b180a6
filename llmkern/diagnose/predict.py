"""Time and memory of a step before it runs: its trace on fake tensors, and the profile of the machine."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .memory import peak
from .profile import Profile
from .run import trace_fake
from .trace import Call, Tracer
from .workload import Workload


@dataclass(frozen=True)
class Prediction:
    """What one step will take.

    Attributes:
        seconds: of the whole step; None without a profile of the machine.
        peak_bytes: of all tensors together, at most, and the scratch of llmkern's C++ kernels; what other ops
            take for themselves meanwhile is not in it.
        parts: the same by part (`memory.PARTS`), at that moment.
        flops, bytes, model_flops: of the whole step, as `costs.Work`.
        tokens: positions in the batch.
    """

    seconds: float | None
    peak_bytes: int
    parts: dict[str, int]
    flops: float
    bytes: float
    model_flops: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    workload: Workload, profile: Profile | None = None, change: Callable[[nn.Module], Any] | None = None
) -> Prediction:
    """Time and memory of a step of `workload`, of which nothing is computed.

    Args:
        workload: the step.
        profile: of the machine that it will run on, for the time.
        change: what to do with the (copied) model before, such as `swap_`.
    """
    tracer = trace_fake(workload, change)
    return from_trace(tracer, profile, workload.tokens)


def attempt(predicted: Callable[[], Prediction]) -> tuple[Prediction | None, str]:
    """The prediction, or None and why: a model may look at values, which fake tensors have not."""
    try:
        return predicted(), ""
    except Exception as error:  # whatever somebody's model raises
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def from_trace(tracer: Tracer, profile: Profile | None, tokens: int) -> Prediction:
    """The prediction from a trace, of fake tensors or of real ones."""
    _, parts = peak(tracer.ledger.timeline())
    calls = tracer.calls
    flops, moved, model_flops = (sum(getattr(c, f) for c in calls) for f in ("flops", "bytes", "model_flops"))
    seconds = None if profile is None else step_seconds(calls, profile)
    return Prediction(seconds, sum(parts.values()), parts, flops, moved, model_flops, tokens)


def step_seconds(calls: list[Call], profile: Profile) -> float:
    """Every call's time here, and what each costs beside its work."""
    return sum(profile.seconds(call) for call in calls) + profile.launch * len(calls)
