"""Learning-rate schedules: functions of the step alone."""

import math

SCHEDULES = ("cosine", "wsd", "constant")


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of `step`: linear up to `peak` over `warmup` steps, then a half cosine to `floor`.

    floor + (peak - floor) (1 + cos(π t)) / 2,  t from 0 at the end of the warm-up to 1 at `steps`

    Source: Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983, eq. 5, with one period.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int, peak: float, floor: float) -> float:
    """Learning rate of `step`: linear up to `peak`, then `peak`, in the last `decay` steps down to `floor`.

    peak + (floor - peak) √t,  t from 0 at the start of the decay to 1 at `steps`

    Source: Hu et al. 2024, MiniCPM, arXiv:2404.06395, sec. 4; the root: Hägele et al. 2024,
    arXiv:2405.18392, eq. 1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, max(0, step - (steps - decay)) / max(1, decay))
    return peak + (floor - peak) * math.sqrt(t)


def learning_rate(
    name: str, step: int, steps: int, warmup: int, decay: int, peak: float, floor: float
) -> float:
    """The rate of `step` under the schedule `name`: "cosine", "wsd", or "constant" after the warm-up."""
    if name == "cosine":
        return warmup_cosine(step, steps, warmup, peak, floor)
    return warmup_stable_decay(step, steps, warmup, decay if name == "wsd" else 0, peak, floor)
