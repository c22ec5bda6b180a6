"""What one device computes in one layer for one micro-batch: FLOPs and bytes of every op.

The ops are those of Megatron's kernels: a norm, a GELU with its bias, a dropout with its residual are one
kernel each; attention is three (scores, softmax, values) or, with flash, one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from .flops import attention_dim
from .hardware import Hardware
from .model import Linear, Model
from .strategy import Strategy

# rows, columns, part of full speed, tiles that one multiprocessor works on together
TILES = ((128, 256, 1.0, 1), (256, 128, 1.0, 1), (128, 128, 0.92, 2))
E = 2  # bytes of an activation: 16 bits
DEPTH = 128  # a product over so many runs at half speed: about 3 us to fill and drain a tile on A100
MATMUL_PART = 0.82  # of peak, where no large product was measured: A100 0.87, H100 0.80, B200 0.78
MEMORY_PART = 0.88  # of the datasheet's bandwidth that a copy reaches: A100 0.88 by BabelStream
CORE = ("scores", "softmax", "values")  # what selective recomputation does again


class Work(NamedTuple):
    """One op: its name, FLOPs, bytes that cross the memory bus; of products the inner dimension and
    (rows, columns, count) of what they make.
    """

    name: str
    flops: float
    bytes: float
    depth: float = float("inf")
    shape: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Rates:
    """What a device sustains: FLOP/s of deep matrix products, bytes/s of memory; its multiprocessors."""

    matmul: float
    memory: float
    units: int = 0

    def arithmetic(self, work: Work) -> float:
        """Seconds of its FLOPs."""
        if not self.units:  # not a GPU: nothing is known about its tiles
            return work.flops / self.matmul
        idle = self.quantization(*work.shape) if work.shape else 1
        return work.flops * (1 + DEPTH / work.depth) * idle / self.matmul

    def quantization(self, rows: float, columns: float, count: float) -> float:
        """Times that `count` products take longer because tiles, and waves of them, come whole.

        NVIDIA, Matrix Multiplication Background User's Guide, sections 4.1 and 4.2; the best tile counts.
        """
        work = []
        for high, wide, speed, together in TILES:
            tiles = ceil(rows / high) * ceil(columns / wide) * count
            slots = self.units * together
            work.append(ceil(tiles / slots) * slots * high * wide / speed)
        return min(work) / (rows * columns * count)

    def seconds(self, work: Work) -> float:
        """Roofline (Williams et al. 2009): the slower of arithmetic and memory."""
        return max(self.arithmetic(work), work.bytes / self.memory)

    def wall(self, work: Work) -> Literal["compute", "memory"]:
        """What `work` waits for."""
        return "compute" if self.arithmetic(work) >= work.bytes / self.memory else "memory"

    def walls(self, works: Iterable[Work]) -> dict[str, float]:
        """Seconds of all `works`, by their wall."""
        total = {"compute": 0.0, "memory": 0.0}
        for work in works:
            total[self.wall(work)] += self.seconds(work)
        return total


def width(dtype: str) -> int:
    """Bytes of an activation, and of a weight that computes."""
    return 4 if dtype in ("float32", "tf32") else E


def rates(device: Hardware, dtype: str = "bfloat16", efficiency: float = 1.0) -> Rates:
    """Measured rates where there are any, parts of the datasheet's otherwise; products times `efficiency`.

    Bytes of ops are counted for 16 bits, so memory counts half as fast for float32.
    """
    matmul = device.matmul.get(dtype) or MATMUL_PART * device.peak(dtype)
    memory = device.bandwidth * (1 if device.measured else MEMORY_PART)
    memory *= E / width(dtype)
    return Rates(efficiency * matmul, memory, device.units)


def product(name: str, m: float, n: float, k: float, count: float = 1, more: float = 0) -> Work:
    """`count` products of (m, k) and (k, n), that move `more` bytes besides their matrices."""
    moved = E * (m * k + k * n + m * n) * count + more
    return Work(name, 2 * m * n * k * count, moved, k, (m, n, count))


def local_size(linear: Linear, tp: int) -> tuple[float, float]:
    """Outputs and inputs of the part of a matrix that one device holds."""
    by_outputs = linear.split == "column" or (linear.split == "expert" and linear.name.endswith("in"))
    by_inputs = linear.split == "row" or (linear.split == "expert" and not by_outputs)
    return linear.outputs / (tp if by_outputs else 1), linear.inputs / (tp if by_inputs else 1)


def local_weights(linear: Linear, s: Strategy) -> float:
    """Weights of a matrix, or of a layer's experts, that one device holds."""
    n, k = local_size(linear, s.tp)
    return n * k * (linear.count / s.ep if linear.split == "expert" else linear.count)


def _matrices(
    model: Model, s: Strategy, tokens: float, expert: bool
) -> Iterator[tuple[str, float, float, float, float]]:
    """(name, m, n, k, count) of the products of a layer; routing is taken as balanced."""
    for linear in model.linears(expert):
        n, k = local_size(linear, s.tp)
        local = linear.count / s.ep if linear.split == "expert" else 1
        yield linear.name, tokens * linear.used / local, n, k, local


def local_tokens(s: Strategy, seq: int) -> float:
    """Tokens of a micro-batch on one device."""
    return s.micro_batch * seq / s.cp


def forward(model: Model, s: Strategy, seq: int, expert: bool = False) -> Iterator[Work]:
    """The ops of one layer forward on one device, for one micro-batch."""
    tokens = local_tokens(s, seq)
    for name, m, n, k, count in _matrices(model, s, tokens, expert):
        yield product(name, m, n, k, count)
    yield from _attention(model, s, seq, tokens)
    yield from passes(model, s, seq, expert)


def passes(model: Model, s: Strategy, seq: int, expert: bool = False) -> Iterator[Work]:
    """Ops that only pass over memory, forward.

    Norms read and write; residual adds read two and write one, and with dropout a mask.
    """
    tokens = local_tokens(s, seq)
    local = tokens * model.width / (s.tp if s.sp else 1)
    yield Work("norms", 0, model.norms * 2 * E * local)
    yield Work("residual adds", 0, 2 * (3 * E + s.dropout) * local)
    inner = model.experts.width * model.experts.active + model.experts.shared if expert else model.ffn
    yield Work("activation", 0, E * tokens * inner / s.tp * (3 if model.gated else 2))
    if not s.flash:
        kv = model.kv_heads * (attention_dim(model) + model.value_dim)
        heads = model.heads * (attention_dim(model) + model.value_dim)
        yield Work("transposes", 0, 2 * E * tokens * (heads + kv) / s.tp)


def _attention(model: Model, s: Strategy, seq: int, tokens: float, products: int = 1) -> Iterator[Work]:
    """Scores, softmax and values; `products` times the products, for backward 2."""
    heads, q, v = model.heads / s.tp, attention_dim(model), model.value_dim
    if s.flash:  # computes only what the mask lets through; backward does the scores again
        keys = seq * (0.5 if model.causal else 1)
        flops = 2 * tokens * keys * heads * (q + v) * (1 if products == 1 else 2.5)
        moved = heads * (q + v) + model.kv_heads / s.tp * (q + v)
        yield Work("attention", flops, products * E * tokens * moved, q + v)
        return
    matrices = tokens / seq * heads  # one (s, s) matrix of scores for each head and sequence
    scores = matrices * seq * seq
    yield product("scores", seq, seq, q, products * matrices)
    yield product("values", seq, v, seq, products * matrices)
    # softmax reads and writes; dropout too, and a mask.  Backward of softmax reads two
    yield Work("softmax", 0, scores * (E * (1 + products) + (2 * E + 1) * s.dropout))


def backward(model: Model, s: Strategy, seq: int, gradient: int, expert: bool = False) -> Iterator[Work]:
    """The ops of one layer backward: the gradient of every input and of every weight.

    Weight gradients are added to those of earlier micro-batches, `gradient` bytes each, within the product or
    by a pass of its own.  A pass reads the incoming gradient besides what forward read.
    """
    weights = 0.0
    for name, m, n, k, count in _matrices(model, s, local_tokens(s, seq), expert):
        yield product(f"{name}, input", m, k, n, count)
        yield product(f"{name}, weight", k, n, m, count, 2 * gradient * k * n * count * s.fused_sums)
        weights += k * n * count
    if not s.fused_sums:
        yield Work("gradient sums", 0, weights * (E + 2 * gradient))
    yield from _attention(model, s, seq, local_tokens(s, seq), products=2)
    for work in passes(model, s, seq, expert):
        yield work._replace(bytes=1.5 * work.bytes)


def again(model: Model, s: Strategy, seq: int, expert: bool = False) -> Iterator[Work]:
    """What backward computes a second time."""
    if s.recompute == "full":
        yield from forward(model, s, seq, expert)
    elif s.recompute == "selective":
        yield from (work for work in forward(model, s, seq, expert) if work.name in CORE)
    elif s.recompute == "ops":
        products = [
            work for work in forward(model, s, seq, expert) if work.flops and work.name != "attention"
        ]
        yield from products[1::2]
        yield from passes(model, s, seq, expert)


def head(model: Model, s: Strategy, seq: int) -> list[Work]:
    """The output embedding and the loss, forward and backward: on the last stage of a pipeline.

    An eager loss reads logits, writes them in float32; backward writes their gradient twice: 20 bytes each.
    """
    m, n, k = local_tokens(s, seq), model.vocab / s.tp, model.width
    products = [product("head", m, n, k), product("head, input", m, k, n), product("head, weight", k, n, m)]
    return [*products, Work("loss", 0, m * n * {"eager": 20, "fused": 3 * E, "linear": 2 * E}[s.loss])]


def embedding(model: Model, s: Strategy, seq: int) -> Work:
    """Looking tokens up, and adding their gradients."""
    return Work("embedding", 0, 3 * E * local_tokens(s, seq) * model.width)
