"""python -m benchmarks.tune: find tiles for the configuration table, kernels/tiles.csv.

On a GPU each candidate is timed on a realistic case, and the fastest becomes the row of that GPU.  Without
one, candidates are compiled for `--gpu` and ranked by what the code takes; that is a guess, it is printed as
one, and the row's source says "compiled".
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
from llmkern.kernels import tiles
from llmkern.kernels.tiles import Tile

from llmkern import machine
from llmkern.ops import use
from llmkern.ops.op import OPS, Make, Sample

from . import aot_compile

DTYPES = {2: torch.bfloat16, 4: torch.float32}
REGISTERS = 65536  # of a multiprocessor; the memory that its blocks share is about as large as one may have
BUSY = 8  # warps that a multiprocessor needs so that one computes exponentials while another multiplies

Cost = Callable[[], tuple[float, str]]  # of the candidate in the table: seconds or a guess, and what of


class Row(NamedTuple):
    """One row to find: its class, a case that uses it, and the kernels of that case that do."""

    kernel: str
    kind: str
    functions: tuple[str, ...]
    op: str
    backward: bool
    sample: Callable[[Make], Sample]


def attention(d: int, **rules) -> Callable[[Make], Sample]:
    def sample(make: Make) -> Sample:
        packed = make(2, 8192, 3, 16, d).permute(2, 0, 3, 1, 4)
        return Sample(f"2x16x8192x{d}", tuple(packed), {"is_causal": True, **rules})

    return sample


def layer(gated: bool, **options) -> Callable[[Make], Sample]:
    def sample(make: Make) -> Sample:
        x, w_in, w_out = make(8192, 4096), make(16384, 4096), make(4096, 16384)
        gate = {"weight_gate": make(16384, 4096)} if gated else {}
        args = (x, w_in, None, w_out, None, "swiglu" if gated else "gelu")
        return Sample("8192x4096x16384", args, {**gate, **options})

    return sample


def rows() -> Iterator[Row]:
    """Every row that can be tuned."""
    for d in (64, 128):
        for kind, rules in ((f"{d}", {}), (f"{d} heavy", {"softcap": 30.0})):
            for kernel, function in (
                ("attention_fwd", "_forward_kernel"),
                ("attention_dkv", "_dkv_kernel"),
                ("attention_dq", "_dq_kernel"),
            ):
                backward = kernel != "attention_fwd"
                yield Row(kernel, kind, (function,), "attention", backward, attention(d, **rules))
    products = ("_gemm_kernel", "_hidden_kernel", "_hidden_bwd_kernel")
    yield Row("gemm", "0", products[:2], "ffn", False, layer(False))
    yield Row("gemm", "1", products[1:], "ffn", True, layer(True))
    seed = {"dropout_p": 0.1, "dropout_seed": torch.tensor(1)}
    yield Row("gemm", "2", products[1:], "ffn", True, layer(True, **seed))


def candidates(row: Row, nbytes: int) -> list[Tile]:
    """Tiles worth a look."""
    if row.kernel == "gemm":
        sizes = ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
        depth = 64 if nbytes == 2 else 16
    else:
        sizes = ((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64))
        depth = 0
    return [Tile(r, c, depth, w, s) for (r, c), w, s in product(sizes, (4, 8), (2, 3)) if r * c // w >= 512]


@dataclass
class Result:
    """A candidate and how good it is: seconds on a GPU, or a guess; infinite if it cannot be used."""

    tile: Tile
    cost: float
    why: str


def best(key: tiles.Key, tried: Sequence[Tile], cost: Cost) -> list[Result]:
    """Every candidate under `cost`, the best first; `cost` runs with the candidate in the table."""
    results = []
    for tile in tried:
        with mock.patch.dict(tiles.TABLE, {key: tile}):
            results.append(Result(tile, *cost()))
    return sorted(results, key=lambda r: r.cost)


def compiled_cost(row: Row, gpu: str, nbytes: int) -> Cost:
    """Cost of a candidate by what its code takes; the guess of this module.

    Warp instructions for each element of a tile, times the elements that come in for each that is made, and
    more where fewer than 8 warps fit a multiprocessor together.
    """
    target = aot_compile.ALL_TARGETS[gpu]

    def cost() -> tuple[float, str]:
        key = (row.kernel, gpu, nbytes, row.kind)
        tile = tiles.TABLE[key]
        total, why = 0.0, []
        for code, warps, shared, problems in compile_row(row, gpu, nbytes):
            if problems:
                return math.inf, "; ".join(problems)
            blocks = min(REGISTERS // (code.registers * 32 * warps), target.shared // max(1, shared))
            resident = max(1, blocks) * warps
            issue = code.instructions * warps / (tile.rows * tile.cols)
            traffic = 1 + 64 * (tile.rows + tile.cols) / (tile.rows * tile.cols)
            total += issue * traffic * max(1.0, BUSY / resident)
            why.append(f"{code.registers} registers, {shared} shared, {code.instructions} instructions")
        return total, " / ".join(why)

    return cost


def compile_row(row: Row, gpu: str, nbytes: int) -> Iterator[tuple]:
    """(code, warps, shared memory, problems) of each kernel of the row, with the table as it stands."""
    found = aot_compile.compile_sample(gpu, row.op, row.sample, DTYPES[nbytes], row.functions)
    for compiled in found:
        yield compiled.code, compiled.warps, compiled.shared, compiled.problems


def measured_cost(row: Row, nbytes: int) -> Cost:
    """Seconds of the case on this GPU; all of it, so that a tile cannot gain at a neighbour's cost."""
    from triton.testing import do_bench

    op, sample = OPS[row.op], row.sample(Make(DTYPES[nbytes], "cuda"))
    floats = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]
    for t in floats:
        t.requires_grad_(row.backward and t.is_floating_point())

    def call() -> None:
        out = op.public(*sample.args, **sample.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if row.backward:
            out.backward(out.detach())

    def cost() -> tuple[float, str]:
        try:
            with use("triton"):
                return do_bench(call, return_mode="median") / 1e3, "seconds"
        except Exception as error:  # too much shared memory, or registers: not a candidate
            return math.inf, f"{type(error).__name__}: {error}"

    return cost


def save(found: dict[tiles.Key, Tile], source: str) -> None:
    """Put rows into tiles.csv, in place of those with the same key."""
    with tiles.PATH.open() as file:
        lines = {tiles.key(r): r for r in csv.DictReader(file)}
    for key, tile in found.items():
        lines[key] = {**dict(zip(tiles.KEY, key)), **tile._asdict(), "source": source}
    with tiles.PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*tiles.KEY, *Tile._fields, "source"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines.values(), key=lambda r: (r["kernel"], r["gpu"], int(r["bytes"]))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a row has no candidate that can be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="as attention_fwd (default: all)")
    parser.add_argument("--kind", nargs="+", help="classes of shape (default: all)")
    parser.add_argument(
        "--gpu", choices=list(aot_compile.ALL_TARGETS), help="compile for this one, and guess"
    )
    parser.add_argument("--bytes", type=int, choices=DTYPES, default=2, help="of an element")
    parser.add_argument("--write", action="store_true", help="put the best into kernels/tiles.csv")
    args = parser.parse_args(argv)
    here = torch.cuda.is_available()
    if not here and not args.gpu:
        parser.error("torch sees no GPU here; --gpu says for which one to compile and guess")
    gpu = args.gpu or tiles.architecture(torch.empty(0, device="cuda"))
    if not args.gpu:
        source = f"measured {machine.slug(torch.cuda.get_device_name())} {machine.describe('cuda')['date']}"
    else:
        source = "compiled"
        print(f"No candidate runs: they are compiled for {gpu} and ranked by a guess (see --help).")
    found = {}
    wanted = [r for r in rows() if not args.kernels or r.kernel in args.kernels]
    for row in (r for r in wanted if not args.kind or r.kind in args.kind):
        key = (row.kernel, gpu, args.bytes, row.kind)
        cost = compiled_cost(row, gpu, args.bytes) if args.gpu else measured_cost(row, args.bytes)
        results = best(key, candidates(row, args.bytes), cost)
        print(f"{row.kernel} {row.kind}, {args.bytes} bytes, {gpu}")
        for r in results:
            print(f"  {r.cost:10.4g}  {tuple(r.tile)}  {r.why}", flush=True)
        if math.isfinite(results[0].cost):
            found[key] = results[0].tile
    if args.write:
        save(found, source)
    return int(len(found) < len(wanted) and not args.kind)


if __name__ == "__main__":
    sys.exit(main())
