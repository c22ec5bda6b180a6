"""The sentences of a diagnosis that the terminal and the page share."""

from .report import Diagnosis
from .units import duration, percent, scaled, size

MEANING = {
    "compute": "arithmetic units are the limit",
    "memory": "moving bytes between memory and caches is the limit",
    "launch": "starting ops, in Python, autograd and dispatch, is the limit",
    "communication": "moving bytes between devices is the limit",
    "data": "the step waits for its batch",
}

SHORT = {
    "scaled_dot_product_flash_attention_for_cpu": "sdpa", "scaled_dot_product_flash_attention": "sdpa",
    "scaled_dot_product_efficient_attention": "sdpa", "scaled_dot_product_cudnn_attention": "sdpa",
    "native_": "", "_backward": "", "_bwd": "", "_fwd": "", "_forward": "", "_data": "",
}  # fmt: skip


def headline(found: Diagnosis) -> str:
    """One sentence: the wall, and the best thing to do about it."""
    share = percent(found.walls[found.wall] / sum(found.walls.values()))
    sentence = f"{share} of the step is at the {found.wall} wall: {MEANING[found.wall]}."
    best = next((r for r in found.remedies if r.speedup > 1.02), None)
    if best is not None:
        sentence += f" The largest gain in sight: {best.name}, {best.speedup:.2f} times the tokens a second."
    return sentence


def facts(found: Diagnosis) -> dict[str, str]:
    """The figures of the whole step."""
    energy = found.energy
    joules = (
        f"not measurable here: {energy.source}"
        if energy.joules is None
        else f"{energy.joules:.3g} J a step, {found.joules_per_token:.3g} J a token ({energy.source})"
    )
    return {
        "step": duration(found.seconds),
        "tokens/s": f"{found.tokens / found.seconds:,.0f}",
        "MFU": percent(found.mfu),
        "HFU": percent(found.hfu),
        "peak memory": size(found.peak_bytes),
        "energy": joules,
    }


def machine(about: dict) -> str:
    """Where and when, from `machine.describe`."""
    return (
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, llmkern {about['llmkern']}, "
        f"{about['date']}"
    )


def ceilings(found: Diagnosis) -> str:
    """What the machine can do at best, as measured."""
    return f"{found.profile.ceilings}, {duration(found.profile.launch)} a launch"


def outcomes(found: Diagnosis) -> list[tuple[str, str, str, str]]:
    """(what, predicted, measured, off by) of the step, and of the swapped step if there is one."""
    rows = []
    for name, each in (("", found), ("swapped: ", found.after)):
        if each is None:
            continue
        predicted = each.prediction
        rows += [
            _outcome(f"{name}step", predicted.seconds, each.seconds, duration),
            _outcome(f"{name}peak memory", predicted.peak_bytes, each.peak_bytes, size),
        ]
    if found.after is not None:
        predicted = found.prediction.seconds / found.after.prediction.seconds
        rows.append(
            _outcome("gain of swap_", predicted, found.seconds / found.after.seconds, lambda x: f"{x:.2f} x")
        )
    return rows


def _outcome(name, predicted, measured, show) -> tuple[str, str, str, str]:
    return name, show(predicted), show(measured), f"{100 * (predicted / measured - 1):+.1f} %"


def op(row) -> str:
    """The op's name without what torch adds to tell its variants apart: "mm", "sdpa backward", "ffn"."""
    name = row.op.partition(".")[2].strip("_")
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def intensity(row) -> str:
    """FLOPs a byte of a row."""
    return f"{row.intensity:.3g}" if row.flops else "0"


def ceiling(row) -> str:
    """The part of its ceiling that a row reached; links have none that was measured."""
    return "-" if row.wall == "communication" else percent(row.ceiling)


def work(row) -> str:
    """FLOPs of a row."""
    return scaled(row.flops, "") if row.flops else "0"
