"""Learning-rate schedules: functions of the step alone."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of `step`: linear up to `peak` over `warmup` steps, then a half cosine to `floor`.

    floor + (peak - floor) (1 + cos(π t)) / 2,  t from 0 at the end of the warm-up to 1 at `steps`

    Source: Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983, eq. 5, with one period.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
