"""Which results have the same bits from run to run, for any number of threads, and alone as in a batch.

The words are those of cuDNN's determinism page: "supported", or "not supported".  Equal bits from run to
run and for any number of threads are promised of every op; alone as in a batch, of the ops of inference that
do not say why not (`Op.batched`, `Op.varies`).
"""

from typing import NamedTuple

import torch
from error_rule import Outcome, run
from torch import Tensor

from llmkern.ops import OPS
from llmkern.ops.op import Make, Op, Sample

THREADS = (1, 2, 4)


class Row(NamedTuple):
    """What is bit-equal; None where the question has no meaning."""

    op: str
    runs: bool
    threads: bool
    batch: bool | None

    @property
    def good(self) -> bool:
        """All that is promised of the op holds."""
        promised = OPS[self.op].batched and not OPS[self.op].varies
        return self.runs and self.threads and (self.batch is True or not promised)


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
    if not op.batched:
        return None
    for seed in range(cases):
        make = Make((torch.float32, torch.bfloat16)[seed % 2], seed=seed)
        batch = _batch(op, make)
        few = {name: t[:1].clone() if name in op.batched else t for name, t in batch.items()}
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
    """Ordinary arguments with 3 to 300 rows, or 3 sequences."""
    rows, width = make.pick(3, 9, 33, 70, 300), make.pick(64, 96, 192, 800)
    if op.name == "attention":
        length = make.pick(40, 500)
        q, k, v = (make(3, heads, length, 32) for heads in (4, 2, 2))
        return {"query": q, "key": k, "value": v, "is_causal": True}
    if op.name == "decode_attention":
        longest = make.pick(90, 3000)
        k_cache, v_cache = (make(3, 2, longest, 32) for _ in "kv")
        q, k, v = (make(3, heads, 1, 32) for heads in (4, 2, 2))
        lengths = torch.tensor((longest - 1, 60, 17), dtype=torch.int32)
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
    if op.family == "rope":
        from llmkern.ops.rope_table import rope_table

        cos, sin = rope_table(9, 32)
        return {"query": make(3, 4, 9, 32), "key": make(3, 2, 9, 32), "cos": cos, "sin": sin}
    norm = {"normalized_shape": (width,)} if op.family == "norm" else {}
    return {"x": make(rows, width), **norm}
