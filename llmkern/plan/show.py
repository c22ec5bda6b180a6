"""A plan in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..display import make_console
from .api import Plan
from .flops import CONVENTIONS
from .hardware import GIB, Hardware
from .inference import Inference
from .model import Model
from .search import CONTEXT, Candidate, both
from .simulate import Point
from .strategy import Strategy

NOT_MODELLED = (
    "Not modelled: data loading, failures (--goodput), other jobs on the network, clocks lowered by heat, "
    "uneven routing of experts. Published runs took 0.95 to 1.07 times what is planned by Megatron on A100, "
    "0.75 to 1.5 times on H100: docs/plan.md."
)


def line(text: str) -> None:
    make_console().print(text, soft_wrap=True)


def names(models: Mapping[str, Model], devices: Mapping[str, Hardware]) -> None:
    """The known models and devices."""
    console = make_console()
    table = _table("Models", "name", "parameters", "layers", "width", "source", left=("name", "source"))
    for name, model in models.items():
        table.add_row(name, f"{model.total:,}", str(model.layers), str(model.width), model.source)
    console.print(table)
    columns = ("name", "title", "TFLOP/s", "memory (GiB)", "GB/s", "W", "$/h")
    table = _table("Devices", *columns, left=("name", "title"))
    for name, d in devices.items():
        best = d.flops.get("bfloat16") or d.flops.get("float16") or d.flops["float32"]
        figures = (f"{best / 1e12:,.1f}", f"{d.memory / GIB:,.0f}", f"{d.bandwidth / 1e9:,.0f}")
        table.add_row(name, d.title, *figures, _or_dash(d.power, ".0f"), _or_dash(d.price, ".2f"))
    console.print(table)


def text(found: Plan) -> str:
    """What `plan` prints."""
    with (console := make_console()).capture() as captured:
        plan(found, console)
    return captured.get()


def plan(found: Plan, console: Console | None = None) -> None:
    """Parameters, FLOPs, strategies, the best one in detail, the run, inference."""
    console, job = console or make_console(), found.job
    what = f"{job.batch:,} sequences of {job.seq:,} tokens a step"
    console.print(f"{job.model.name} on {job.devices:,} x {job.device.title}, {what}", soft_wrap=True)
    for note in job.model.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(_parameters(job.model), _flops(found), _strategies(found))
    console.print(_mesh(found.best.strategy), soft_wrap=True)
    console.print(_memory(found.best, job.device))
    console.print(_time(found), _run(found))
    if found.inference:
        console.print(_inference(found.inference))
    else:
        console.print("Inference: the weights do not fit on one node in 16 bits.")
    console.print(NOT_MODELLED)


def _mesh(s: Strategy) -> str:
    """The fastest strategy as `llmkern train` takes it, and what that has not of it."""
    mesh = ",".join(f"{name}={size}" for name, size in s.mesh.items() if size > 1) or "dp=1"
    other = [f"ZeRO-{s.zero} as fsdp, which sends more"] if s.zero in (1, 2) else []
    other += ["stages of one chunk"] if s.interleave > 1 else []
    other += ["experts whole"] if s.ep > 1 else []
    return f"The mesh of the fastest: --parallel {mesh}" + (f" ({'; '.join(other)})" if other else "")


def inference(found: Inference) -> None:
    """Inference alone."""
    make_console().print(_inference(found))


def scaling(points: list[Point]) -> None:
    """Step time by number of devices."""
    columns = ("devices", "strategy", "batch", "step", "tokens/s a device", "MFU", "wall")
    table = _table("Scaling", *columns, left=("strategy", "wall"))
    for p in points:
        speed = f"{p.tokens_per_second / p.devices:,.0f}"
        mfu = f"{p.mfu:.1%}"
        table.add_row(f"{p.devices:,}", p.strategy, f"{p.batch:,}", seconds(p.seconds), speed, mfu, p.wall)
    make_console().print(table)


def _table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or name in left else "right")
    return table


def _parameters(model: Model) -> Table:
    table = _table("Parameters", "part", "count", "%")
    for part, count in model.parameters().items():
        if count:
            table.add_row(part, f"{count:,}", f"{100 * count / model.total:.1f}")
    table.add_section()
    table.add_row("all", f"{model.total:,}", "100.0")
    if model.active != model.total:
        table.add_row("active for a token", f"{model.active:,}", f"{100 * model.active / model.total:.1f}")
    return table


def _flops(found: Plan) -> Table:
    """Training FLOPs of a token, and the best strategy's MFU, under each convention."""
    table = _table("Training FLOPs of a token", "attention", "FLOPs", "MFU", "used by", left=("used by",))
    rates = found.mfu(found.best)
    for name, (_, users) in CONVENTIONS.items():
        where = users[users.index("(") + 1 : -1]
        table.add_row(name, f"{found.flops.training(name):.4g}", f"{rates[name]:.1%}", where)
    done = found.flops.hardware(found.best.strategy.recompute)
    table.add_row("full, hardware", f"{done:.4g}", f"HFU {found.hfu(found.best):.1%}", "with recomputation")
    return table


def _strategies(found: Plan) -> Table:
    columns = ("strategy", "GiB a device", "step", "tokens/s", "MFU", "wall")
    table = _table("Fastest strategies that fit (MFU: attention full)", *columns, left=("wall",))
    for c in found.candidates:
        wall = ", ".join(f"{name} {part / c.time.total:.0%}" for name, part in c.time.walls.items() if part)
        speed, mfu = found.tokens_per_second(c), found.mfu(c)["full"]
        size = f"{(c.memory.reserved + CONTEXT) / GIB:.1f}"
        table.add_row(str(c.strategy), size, seconds(c.time.total), f"{speed:,.0f}", f"{mfu:.1%}", wall)
    return table


def _memory(best: Candidate, device: Hardware) -> Table:
    title = f"Memory of the fastest, a device of its {best.memory.stage} stage"
    table = _table(title, "part", "GiB", "GB")
    for part, size in best.memory.parts.items():
        table.add_row(part, *_sizes(size))
    table.add_section()
    table.add_row("live tensors", *_sizes(best.memory.total))
    table.add_row("reserved, and driver", *_sizes(best.memory.reserved + CONTEXT))
    table.add_row("the device has", *_sizes(device.memory))
    return table


def _sizes(size: float) -> tuple[str, str]:
    return f"{size / GIB:,.2f}", f"{size / 1e9:,.2f}"


def _time(found: Plan) -> Table:
    """Where the seconds of a step go; of communication also bytes, and what is hidden."""
    time = found.best.time
    columns = ("seconds of a step of the fastest", "shown", "hidden", "GB sent")
    table = _table("Time", *columns)
    table.add_row("compute", seconds(time.compute), "", "")
    table.add_row("memory", seconds(time.memory), "", "")
    for name in time.volume:
        shown, hidden = time.exchange.get(name, 0), time.hidden.get(name, 0)
        table.add_row(name, seconds(shown), seconds(hidden), f"{time.volume[name] / 1e9:,.2f}")
    table.add_row("pipeline bubble", seconds(time.bubble), "", "")
    table.add_section()
    table.add_row("step", seconds(time.total), "", "")
    return table


def _run(found: Plan) -> Table:
    run, energy = found.run, found.run.energy
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_column(), table.add_column(justify="right")
    table.add_row("tokens", f"{run.tokens:.4g}")
    table.add_row("training FLOPs (attention full)", f"{run.tokens * found.flops.training():.4g}")
    table.add_row("steps", f"{run.steps:,.0f}")
    table.add_row(f"time at a goodput of {run.goodput:g}", seconds(run.seconds))
    table.add_row("device-hours", f"{run.device_hours:,.0f}")
    money = "no list price; give --price" if run.dollars is None else f"$ {run.dollars:,.0f}"
    table.add_row("money", money)
    if energy is None:
        table.add_row("energy", "nobody says what this device draws; give --power")
        return table
    spread = f" ({energy.low:,.0f} to {energy.high:,.0f})" if energy.low < energy.high else ""
    table.add_row(f"energy, {energy.basis}, PUE {energy.pue:g}", f"{energy.kwh:,.0f} kWh{spread}")
    table.add_row(f"CO2e at {energy.grid:g} g a kWh", f"{energy.co2e / 1000:,.2f} t")
    return table


def _inference(found: Inference) -> Table:
    how = f"{found.sequences} x ({found.prompt:,} + {found.reply:,}) tokens"
    title = f"Inference on {found.devices} device(s), {how}, 16 bits"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(), table.add_column(justify="right")
    rates = (found.prefill_rate, found.prefill_wall), (found.decode_rate, found.decode_wall)
    for name, (rate, wall) in zip(("prefill", "decode"), rates):
        table.add_row(name, f"{rate:,.0f} tokens/s, wall {wall}")
    table.add_row("first token after", seconds(found.prefill_seconds))
    table.add_row("weights a device", both(found.weights))
    table.add_row("KV cache of a token", f"{found.cache_per_token / 1024:,.1f} KiB")
    table.add_row("KV cache a device", both(found.cache))
    table.add_row("sequences that fit", f"{found.most_sequences:,}")
    return table


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
