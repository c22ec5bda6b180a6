"""The targets of a GPU run: what is measured, against whom, and what must be reached."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmkern.ops.decode_samples import inputs
from llmkern.ops.op import Make, Sample
from llmkern.ops.rope_table import rope_table


class Goal(NamedTuple):
    """One case of one op.

    Attributes:
        half: "fwd", or "fwd+bwd".
        sample: makes the arguments; `scale` divides the sizes, so that a dry run is small.
        ratio: times faster than the fastest of `peers` (all peers that are there, if empty).
        against: further peers -> times faster than each.
        teraflops: of the op's own work, counted once.
        bandwidth: share of the rate of a copy in this run.
        memory: peak beyond the inputs, as a share of eager torch's.
    """

    op: str
    half: str
    label: str
    sample: Callable[[Make, int], Sample]
    ratio: float | None = None
    peers: tuple[str, ...] = ()
    against: dict[str, float] = {}
    teraflops: float | None = None
    bandwidth: float | None = None
    memory: float | None = None


def _attention(length: int, dim: int) -> Callable[[Make, int], Sample]:
    def sample(make: Make, scale: int) -> Sample:
        batch, heads, s = max(1, 16384 // length // scale), max(1, 2048 // dim // scale), length // scale
        packed = make(batch, s, 3, heads, dim).permute(2, 0, 3, 1, 4)
        return Sample("", tuple(packed), {"is_causal": True})

    return sample


def _decode(make: Make, scale: int) -> Sample:
    b, s = 32 // min(scale, 16), 8192 // scale
    return Sample("", *inputs(make, b, 32, 4, s, 128, (s - 1,) * b))


def _ffn(make: Make, scale: int) -> Sample:
    n, d, f = 8192 // scale, 4096 // scale, 16384 // scale
    return Sample("", (make(n, d), make(f, d), make(f), make(d, f), make(d), "gelu"), {})


def _rows(*weights: str) -> Callable[[Make, int], Sample]:
    def sample(make: Make, scale: int) -> Sample:
        n, d = 16384 // scale, 4096 // scale
        return Sample("", (make(n, d), (d,), *(make(d) for _ in weights)), {})

    return sample


def _cross_entropy(make: Make, scale: int) -> Sample:
    n, classes = 8192 // scale, 128256 // scale
    return Sample("", (make(n, classes), make.integers(classes, n)), {})


def _linear_cross_entropy(make: Make, scale: int) -> Sample:
    n, d, classes = 8192 // scale, 4096 // scale, 128256 // scale
    return Sample("", (make(n, d), make(classes, d, scale=0.02), make.integers(classes, n)), {})


def _rope(make: Make, scale: int) -> Sample:
    s = 4096 // scale
    q, k = make(4, s, 32, 128).transpose(1, 2), make(4, s, 8, 128).transpose(1, 2)
    return Sample("", (q, k, *rope_table(s, 128, device=make.device)), {})


def _adamw(make: Make, scale: int) -> Sample:
    lists = [[make(2**22 // scale) for _ in range(24)] for _ in range(4)]
    lists[3] = [t.square() for t in lists[3]]
    return Sample("", tuple(lists), {"step": 10})


def goals() -> Iterator[Goal]:
    """In the order in which they are measured: what matters most comes first."""
    for length in (8192, 2048, 16384):
        fast = length == 8192
        label = f"hd 128, causal, {length}, 16k tokens"
        yield Goal("attention", "fwd", label, _attention(length, 128), 1.0, teraflops=600 if fast else None)
        yield Goal(
            "attention", "fwd+bwd", label, _attention(length, 128), 1.0, teraflops=500 if fast else None
        )
    liger, copy = {"liger": 1.2}, 0.9
    yield Goal("decode_attention", "fwd", "32 x 8k, GQA 8, hd 128", _decode, bandwidth=0.85)
    yield Goal("ffn", "fwd+bwd", "8192 x 4096 x 16384, gelu", _ffn, 1.05, ("eager", "max-autotune"))
    yield Goal(
        "linear_cross_entropy", "fwd+bwd", "8192 x 4096 x 128256", _linear_cross_entropy, 1.0, ("eager",),
        {"liger": 1.5}, memory=0.1,
    )  # fmt: skip
    for half in ("fwd", "fwd+bwd"):
        yield Goal("rms_norm", half, "16384 x 4096", _rows("weight"), None, (), liger, bandwidth=copy)
        yield Goal(
            "layer_norm", half, "16384 x 4096", _rows("weight", "bias"), None, (), liger, bandwidth=copy
        )
        yield Goal("cross_entropy", half, "8192 x 128256", _cross_entropy, None, (), liger, bandwidth=copy)
    yield Goal("rope", "fwd", "4 x 4096, 32 and 8 heads of 128", _rope, None, (), liger, bandwidth=copy)
    yield Goal("adamw", "fwd", "24 of 4 Mi", _adamw, bandwidth=copy)
    for length in (8192, 2048):
        for half in ("fwd", "fwd+bwd"):
            yield Goal("attention", half, f"hd 64, causal, {length}, 16k tokens", _attention(length, 64), 1.0)
