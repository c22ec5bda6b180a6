"""Plan a model before any hardware exists: memory, time, money and energy, and the wall that binds."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError
from . import config, energy, hardware, search
from .api import KERNELS, Plan, plan, serve
from .flops import Recompute
from .strategy import RECIPES

DIVISIONS = ("dp", "tp", "pp", "cp", "ep", "micro_batch", "interleave")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = "a name (--list), a Hugging Face config.json or its folder"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    parser.add_argument("--on", default="h100", metavar="HARDWARE", help="a device of the catalogue (--list)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many devices")
    parser.add_argument("--list", action="store_true", help="show the known models and devices")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    work = parser.add_argument_group("the run")
    work.add_argument("--batch", type=int, metavar="N", help="sequences of a step")
    work.add_argument("--seq", type=int, metavar="N", help="tokens of a sequence")
    work.add_argument("--tokens", type=float, metavar="N", help="to train on; default 20 a parameter")
    work.add_argument("--dtype", help="of the products: bfloat16, float16, float32, tf32, float8")
    work.add_argument("--recipe", default="mixed", help=f"kept for a parameter: {', '.join(RECIPES)}")
    work.add_argument("--kernels", default="fused", choices=KERNELS, help="llmkern's or eager torch's")
    fixed = parser.add_argument_group("the strategy", "what is not given is searched")
    for name in DIVISIONS:
        fixed.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    fixed.add_argument("--zero", type=int, metavar="STAGE", help="0 DDP, 1, 2, 3 FSDP")
    fixed.add_argument("--recompute", choices=get_args(Recompute))
    fixed.add_argument("--no-flash", dest="flash", action="store_false", default=None)
    fixed.add_argument("--top", type=int, default=5, metavar="N", help="strategies to show")
    cost = parser.add_argument_group("time, money, energy")
    cost.add_argument(
        "--goodput", type=float, default=1.0, help="part of the time that trains (0.9: 10 %% lost)"
    )
    cost.add_argument("--price", type=float, metavar="DOLLARS", help="of a device-hour")
    cost.add_argument("--power", type=float, metavar="WATTS", help="measured, of a device")
    cost.add_argument(
        "--pue", type=float, default=energy.PUE, help="power of the building over its computers'"
    )
    cost.add_argument("--grid", default="world", help=f"grams of CO2e a kWh, or {', '.join(energy.GRIDS)}")
    served = parser.add_argument_group("inference")
    served.add_argument("--serve", action="store_true", help="inference alone")
    served.add_argument("--sequences", type=int, default=1, metavar="N", help="at once")
    served.add_argument("--prompt", type=int, metavar="TOKENS")
    served.add_argument("--reply", type=int, default=256, metavar="TOKENS")
    scale = parser.add_argument_group("simulation")
    scale.add_argument(
        "--simulate", action="store_true", help="step time from 1 to 16,384 devices, and a plot"
    )
    scale.add_argument("--out", type=Path, default=Path("scaling.png"), help="the plot (needs llmkern[plot])")


def run(args: argparse.Namespace) -> int:
    from . import show, simulate

    if args.list:
        show.names(config.published(), hardware.catalogue())
        return 0
    if args.model is None:
        raise UserError("MODEL is missing; expected a name (`llmkern plan --list`) or a config.json")
    settings = _settings(args)
    if args.simulate:
        points = simulate.scaling(args.model, args.on, **settings)
        if args.json:
            _print_json([dataclasses.asdict(point) for point in points])
        else:
            show.scaling(points)
            show.line(f"saved {simulate.plot(args.out, points, args.on)}")
        return 0
    if args.serve:
        return _serve(args)
    found = plan(args.model, args.on, args.gpus, **settings)
    if args.json:
        _print_json(as_json(found))
    else:
        show.plan(found)
    return 0


def _serve(args: argparse.Namespace) -> int:
    """Inference alone: also for models that could not be trained there."""
    from . import show

    model, device = config.find(args.model), hardware.find(args.on)
    prompt = args.prompt or min(args.seq or 2048, model.context)
    found = serve(model, device, args.sequences, prompt, args.reply, args.dtype)
    if found is None:
        need = search.both(2 * model.total)
        raise UserError(
            f"{model.name} needs {need} for its weights in 16 bits, and room for its cache; a node has "
            f"{device.node} x {search.both(device.memory)}"
        )
    if args.json:
        _print_json(dataclasses.asdict(found))
    else:
        show.inference(found)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan` besides model, hardware and their number."""
    names = (*DIVISIONS, "zero", "recompute", "flash")
    strategy = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    names = (
        "batch",
        "seq",
        "tokens",
        "dtype",
        "recipe",
        "kernels",
        "top",
        "goodput",
        "price",
        "power",
        "pue",
    )
    names += ("grid", "sequences", "prompt", "reply")
    return {"strategy": strategy, **{name: getattr(args, name) for name in names}}


def as_json(found: Plan) -> dict[str, Any]:
    """Everything that a plan holds, and what is derived from it; in seconds, bytes, watts and dollars."""
    job = found.job
    result = {
        "model": dataclasses.asdict(job.model),
        "parameters": job.model.parameters(),
        "total_parameters": job.model.total,
        "active_parameters": job.model.active,
        "hardware": dataclasses.asdict(job.device),
        "devices": job.devices,
        "batch": job.batch,
        "seq": job.seq,
        "dtype": job.dtype,
        "recipe": dataclasses.asdict(job.recipe),
        "flops_per_token": {
            "forward": dataclasses.asdict(found.flops),
            "training": {name: found.flops.training(name) for name in ("full", "causal", "left out")},
        },
        "strategies": [],
        "run": dataclasses.asdict(found.run),
        "inference": found.inference and dataclasses.asdict(found.inference),
    }
    for candidate in found.candidates:
        fields = dataclasses.asdict(candidate)
        fields["name"], fields["mesh"] = str(candidate.strategy), candidate.strategy.mesh
        fields["memory"] |= {"total": candidate.memory.total, "reserved": candidate.memory.reserved}
        fields["time"] |= {"total": candidate.time.total, "walls": candidate.time.walls}
        fields["wall"] = candidate.time.wall
        fields["tokens_per_second"] = found.tokens_per_second(candidate)
        fields["mfu"], fields["hfu"] = found.mfu(candidate), found.hfu(candidate)
        result["strategies"].append(fields)
    return result


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    print()
