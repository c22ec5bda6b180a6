"""Inputs of the feed-forward layer: ordinary and nasty, realistic, random, and for every kernel variant."""

import math
from collections.abc import Iterator

from .activation import ACTIVATIONS, GATED
from .op import Make, Sample


def samples(make: Make) -> Iterator[Sample]:
    def layer(n, d, f, out=None):
        out = out or d
        s = 1 / math.sqrt(d)
        return make(n, d), make(f, d, scale=s), make(f), make(out, f, scale=1 / math.sqrt(f)), make(out)

    for f in ACTIVATIONS:
        yield Sample(f, (*layer(9, 32, 64), f), {})
    for f in GATED:
        gate = {"weight_gate": make(48, 32, scale=0.2), "bias_gate": make(48)}
        yield Sample(f, (*layer(9, 32, 48), f), gate)
    yield Sample("larger", (*layer(130, 96, 384), "gelu"), {})
    yield Sample("prime sizes", (*layer(13, 37, 71, 29), "gelu_tanh"), {})
    yield Sample("ones", (*layer(1, 1, 1), "silu"), {})
    x, w_in, _, w_out, _ = layer(6, 40, 80)
    yield Sample("no bias", (x.view(2, 3, 40), w_in, None, w_out, None, "relu"), {})
    yield Sample(
        "no bias, gate", (x, w_in, None, w_out, None, "swiglu"), {"weight_gate": make(80, 40, scale=0.2)}
    )
    x, w_in, b_in, w_out, b_out = layer(20, 24, 56)
    transposed = (w_in.t().contiguous().t(), b_in, w_out.t().contiguous().t(), b_out)
    yield Sample("transposed weights", (x, *transposed, "gelu"), {})
    yield Sample("strided x", (make(20, 48)[:, ::2], w_in, b_in, w_out, b_out, "gelu"), {})
    yield Sample("empty", (make(0, 24), w_in, b_in, w_out, b_out, "gelu"), {})
    yield Sample("large", (100 * x, w_in, b_in, w_out, b_out, "gelu"), {})
    residual = {"residual": make(3, 7, 29)}
    x, *weights = layer(21, 37, 71, 29)
    yield Sample("residual", (x.view(3, 7, 37), *weights, "silu"), residual)
    yield Sample("recompute", (x, *weights, "gelu"), {"recompute": True})
    seed = {"dropout_seed": make.integers(2**62)}
    gate = {"weight_gate": make(71, 37, scale=0.2), "recompute": True}
    yield Sample("dropout", (x, *weights, "gelu"), {"dropout_p": 0.3, **seed})
    both = {"dropout_p": 0.5, "output_dropout_p": 0.2, **seed}
    yield Sample("everything", (x.view(3, 7, 37), *weights, "swiglu"), {**gate, **both, **residual})


def benchmarks(make: Make) -> Iterator[Sample]:
    for n, d in ((2048, 384), (2048, 768)):
        w_in, w_out = make(4 * d, d, scale=d**-0.5), make(d, 4 * d, scale=(4 * d) ** -0.5)
        yield Sample(f"{n}x{d}x{4 * d} gelu", (make(n, d), w_in, make(4 * d), w_out, make(d), "gelu"), {})
    n, d, f = 2048, 768, 2048
    w_in, w_gate = make(f, d, scale=d**-0.5), make(f, d, scale=d**-0.5)
    args = (make(n, d), w_in, None, make(d, f, scale=f**-0.5), None, "swiglu")
    yield Sample(f"{n}x{d}x{f} swiglu", args, {"weight_gate": w_gate})


def variants(make: Make) -> Iterator[Sample]:
    w_in, w_out = make(1024, 256), make(256, 1024)
    options = {"dropout_p": 0.1, "output_dropout_p": 0.1, "dropout_seed": make.integers(2**62)}
    options |= {"residual": make(512, 256)}
    yield Sample("dropout", (make(512, 256), w_in, None, w_out, None, "gelu"), options)
    yield Sample(
        "gate and dropout",
        (make(512, 256), w_in, None, w_out, None, "swiglu"),
        {"weight_gate": w_in, **options},
    )


def draw(make: Make) -> Sample:
    n, d, f, out = make.size(40), make.size(70), make.size(100), make.size(40)
    x = make.laid_out(*make.pick((n, d), (2, n, d)), scale=make.pick(0.1, 1, 10))
    w_in, w_out = make.laid_out(f, d, scale=d**-0.5), make.laid_out(out, f, scale=f**-0.5)
    gated = make.pick(True, False)
    kwargs = {"recompute": make.pick(True, False)}
    if gated:
        kwargs |= {"weight_gate": make.laid_out(f, d, scale=d**-0.5), "bias_gate": make.pick(None, make(f))}
    if make.pick(0, 1):
        kwargs["residual"] = make.laid_out(*x.shape[:-1], out)
    if make.pick(0, 0, 1):
        kwargs |= {
            "dropout_p": 0.3,
            "output_dropout_p": make.pick(0.0, 0.2),
            "dropout_seed": make.integers(2**62),
        }
    biases = make.pick(None, make(f)), make.pick(None, make(out))
    activation = make.pick(*(GATED if gated else ACTIVATIONS))
    return Sample("random", (x, w_in, biases[0], w_out, biases[1], activation), kwargs)
