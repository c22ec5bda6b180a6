"""Which results have the same bits from run to run, for any number of threads, and alone as in a batch.

The words are those of cuDNN's determinism page: "supported", or "not supported".
"""

from typing import NamedTuple

import torch
from error_rule import Outcome, run
from torch import Tensor

from llmkern.ops import OPS
from llmkern.ops.op import Make, Op, Sample

THREADS = (1, 2, 4)
# the arguments of the ops of inference that have one row, or one sequence, for each result
BATCHED = {
    "attention": ("query", "key", "value"),
    "decode_attention": ("query", "k_cache", "v_cache", "cache_seqlens", "key", "value"),
    "embedding": ("idx",),
    "ffn": ("x",),
    "layer_norm": ("x",),
    "linear": ("input",),
    "log_softmax": ("x",),
    "quant_linear": ("input",),
    "rms_norm": ("x",),
    "rope": ("query", "key"),
    "softmax": ("x",),
}
NOT_INVARIANT = {"quant_linear": "one row of x meets codes of 4 bits as whole numbers, more rows as floats"}


class Row(NamedTuple):
    """What is bit-equal; None where the question has no meaning."""

    op: str
    runs: bool
    threads: bool
    batch: bool | None


def row(op: Op, repeats: int, cases: int, backend: str = "cpp") -> Row:
    """Run `cases` random calls `repeats` times with each number of threads."""
    before = torch.get_num_threads()
    same_runs = same_threads = True
    try:
        for seed in range(cases):
            sample = _sample(op, seed)
            firsts = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                first, *others = (run(op, sample, backend=backend) for _ in range(repeats))
                same_runs &= all(equal(first, other) for other in others)
                firsts.append(first)
            same_threads &= all(equal(firsts[0], other) for other in firsts[1:])
    finally:
        torch.set_num_threads(before)
    return Row(op.name, same_runs, same_threads, _alone_as_in_batch(op, cases, backend))


def table(repeats: int, cases: int) -> list[Row]:
    return [row(op, repeats, cases) for op in OPS.values()]


def equal(a: Outcome, b: Outcome) -> bool:
    """Bit for bit, and every NaN equal to every other."""
    pairs = zip((*a.outputs, *a.gradients), (*b.outputs, *b.gradients))
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in pairs)


def _sample(op: Op, seed: int) -> Sample:
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    return op.draw(Make(dtype, seed=seed))


def _alone_as_in_batch(op: Op, cases: int, backend: str) -> bool | None:
    """The first row of a batch of rows, computed in it and alone."""
    if op.name not in BATCHED:
        return None
    for seed in range(cases):
        make = Make((torch.float32, torch.bfloat16)[seed % 2], seed=seed)
        batch = _batch(op, make)
        few = {name: t[:1].clone() if name in BATCHED[op.name] else t for name, t in batch.items()}
        whole, alone = (
            run(op, Sample("batch", (), {k: _copied(v) for k, v in call.items()}), backend=backend)
            for call in (batch, few)
        )
        if not all(torch.equal(w[:1], a) for w, a in zip(whole.outputs, alone.outputs)):
            return False
    return True


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _batch(op: Op, make: Make) -> dict:
    """Ordinary arguments with 9 to 70 rows, or 3 sequences."""
    rows, width = make.pick(9, 33, 70), make.pick(64, 96, 192)
    if op.name == "attention":
        q, k, v = (make(3, heads, 40, 32) for heads in (4, 2, 2))
        return {"query": q, "key": k, "value": v, "is_causal": True}
    if op.name == "decode_attention":
        q, *rest = (
            make(3, heads, length, 32) for heads, length in ((4, 1), (2, 90), (2, 90), (2, 1), (2, 1))
        )
        k_cache, v_cache, k, v = rest
        lengths = torch.tensor((17, 60, 89), dtype=torch.int32)
        caches = {"k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths}
        return {"query": q, **caches, "key": k, "value": v}
    if op.name == "embedding":
        return {"idx": make.integers(50, rows, 5), "weight": make(50, width)}
    if op.name == "ffn":
        weights = {"weight_in": make(2 * width, width), "weight_out": make(width, 2 * width)}
        return {"x": make(rows, width), "bias_in": None, "bias_out": None, **weights}
    if op.name == "linear":
        return {"input": make(rows, width), "weight": make(77, width)}
    if op.name == "quant_linear":
        from llmkern.ops.quant_weight import quantize

        qweight, scales, *_ = quantize(make(77, width), make.pick(4, 8), 32)
        return {"input": make(rows, width), "qweight": qweight, "scales": scales}
    if op.name == "rope":
        from llmkern.ops.rope_table import rope_table

        cos, sin = rope_table(9, 32)
        return {"query": make(3, 4, 9, 32), "key": make(3, 2, 9, 32), "cos": cos, "sin": sin}
    norm = {"normalized_shape": (width,)} if op.family == "norm" else {}
    return {"x": make(rows, width), **norm}
