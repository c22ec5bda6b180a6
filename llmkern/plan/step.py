"""Seconds of a training step: roofline of every op, exchanges from measured bandwidth, pipeline bubble.

Every part is derived from hardware figures but one number, `EFFICIENCY`.
"""

import dataclasses
from dataclasses import dataclass

from . import collectives, work
from .hardware import Hardware
from .model import Model
from .strategy import Recipe, Strategy
from .work import Rates, local_tokens, local_weights

# The one calibration: matrix products of a training step run at this part of the rate that a large product
# alone was measured to reach.  Fitted once, to the 18 iteration times of arXiv:2104.04473 (table 1) and
# arXiv:2205.05198 (table 5) together: the value of least mean error (`python -m benchmarks.plan --fit`).
EFFICIENCY = 0.87

# Part of hidden communication that shows nevertheless: NCCL's kernels take multiprocessors from the products.
# Not fitted here: Calculon's figure for NVLink (Isaev et al. 2023, doi:10.1145/3581784.3607102, A100 system).
INTERFERENCE = 0.15

FFN = ("ffn", "experts", "shared", "activation")  # ops of a feed-forward begin so


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, by what the slowest device does in them.

    Attributes:
        compute: ops that wait for arithmetic.
        memory: ops that wait for memory, and the optimizer.
        exchange: what -> seconds of communication that nothing hides.
        hidden: what -> seconds of communication behind computation.
        bubble: waiting for the pipeline to fill and drain (arXiv:2104.04473, section 2.2).
        volume: what -> bytes that each device sends in the step.
    """

    compute: float
    memory: float
    exchange: dict[str, float]
    hidden: dict[str, float]
    bubble: float
    volume: dict[str, float]

    @property
    def communication(self) -> float:
        return sum(self.exchange.values())

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.communication + self.bubble

    @property
    def walls(self) -> dict[str, float]:
        """Seconds by wall, the largest first."""
        walls = {"compute": self.compute, "memory": self.memory, "communication": self.communication}
        return dict(sorted({**walls, "bubble": self.bubble}.items(), key=lambda item: -item[1]))

    @property
    def wall(self) -> str:
        """The wall that binds: where most seconds go."""
        return next(iter(self.walls))


@dataclass
class Exchange:
    """Adds up communication: seconds that show, seconds that computation hides, bytes."""

    shown: dict[str, float]
    hidden: dict[str, float]
    volume: dict[str, float]

    def add(self, name: str, seconds: float, size: float, behind: float = 0.0) -> None:
        """`seconds` of exchange of `size` bytes, of which up to `behind` are hidden."""
        hidden = min(seconds, behind)
        for into, value in (
            (self.shown, seconds - hidden + INTERFERENCE * hidden),
            (self.hidden, hidden),
            (self.volume, size),
        ):
            into[name] = into.get(name, 0.0) + value

    def scaled(self, times: float) -> "Exchange":
        return Exchange(
            *({k: v * times for k, v in d.items()} for d in (self.shown, self.hidden, self.volume))
        )


def predict(
    model: Model, device: Hardware, s: Strategy, recipe: Recipe, batch: int, seq: int,
    dtype: str = "bfloat16", efficiency: float = EFFICIENCY,
) -> StepTime:  # fmt: skip
    """Seconds of a step of `batch` sequences of `seq` tokens.

    A pipeline runs at the pace of its slowest stage: the last, which has the output embedding.
    """
    rates, width = work.rates(device, dtype, efficiency), work.width(dtype)
    m = batch / (s.dp * s.micro_batch)
    walls, comm = _stage(model, device, s, recipe, seq, rates, width)
    head = rates.walls(work.head(model, s, seq))
    stage = sum(walls.values()) + sum(comm.shown.values())
    _exchange_ends(comm, model, device, s, seq, rates, width)
    memory = m * (walls["memory"] + head["memory"]) + rates.seconds(work.embedding(model, s, seq)) * m
    total = comm.scaled(m)
    parameters = local_parameters(model, s)
    updated = parameters / (s.shards if s.zero else 1)
    behind = s.overlap * (walls["compute"] + walls["memory"])
    _reduce(total, device, s, recipe, parameters, behind, width)
    _sum_copies(total, model, device, s, recipe)
    return StepTime(
        m * (walls["compute"] + head["compute"]),
        memory + updated * recipe.update / rates.memory,
        total.shown,
        total.hidden,
        (s.pp - 1) / s.interleave * stage,
        total.volume,
    )


def _stage(
    model: Model, device: Hardware, s: Strategy, recipe: Recipe, seq: int, rates: Rates, width: int
) -> tuple[dict[str, float], Exchange]:  # fmt: skip
    """Seconds of one stage for one micro-batch, forward and backward: by wall, and its exchanges."""
    walls, comm = {"compute": 0.0, "memory": 0.0}, Exchange({}, {}, {})
    kinds = [(False, model.layers - model.expert_layers), (True, model.expert_layers)]
    for expert, layers in kinds:
        if not layers:
            continue
        ahead = rates.walls(work.forward(model, s, seq, expert))
        back = rates.walls(
            [*work.again(model, s, seq, expert), *work.backward(model, s, seq, recipe.gradient, expert)]
        )
        part = layers / s.pp
        for wall in walls:
            walls[wall] += part * (ahead[wall] + back[wall])
        times = [part * sum(half.values()) for half in (ahead, back)]
        _exchange_activations(comm, model, device, s, seq, part, times, expert, rates, width)
        if s.zero == 3:
            group = _layer_parameters(model, s, expert) + model.layer_norms()
            _gather(comm, device, s, recipe, group, part, times, width)
    if s.zero == 3:  # the root keeps its embeddings and last norm from forward to backward
        root = local_parameters(model, s, outside=True)
        _gather(comm, device, s, recipe, root, 1, [0.0, sum(walls.values())], width, again=False)
    if s.pp > 1:
        payload = width * local_tokens(s, seq) * model.width / s.tp
        once = collectives.send_seconds(device, payload, s.dp * s.tp * s.cp < device.node)
        comm.add("PP sends", 2 * s.interleave * once, 2 * s.interleave * payload)
    return walls, comm


def _exchange_activations(comm, model, device, s, seq, layers, times, expert, rates, width) -> None:
    """Tensor, context and expert parallelism, in `layers` layers for one micro-batch."""
    tokens = local_tokens(s, seq)
    if s.tp > 1:
        size = width * tokens * model.width
        wire = layers * size * collectives.factor("all_reduce", s.tp)
        for count, pieces, behind in _tensor_exchanges(model, s, seq, layers, times, expert, rates):
            once = pieces * collectives.seconds(device, "all_reduce", size / pieces, s.tp, device.node)
            comm.add("TP", layers * count * once, count * wire, behind)
    if s.cp > 1:  # keys and values pass round a ring behind the attention of the part at hand
        size = width * tokens * model.kv_heads / s.tp * (model.head_dim + model.value_dim) * (s.cp - 1)
        once = collectives.send_seconds(device, size, s.tp * s.cp <= device.node)
        attention = [w for w in work.forward(model, s, seq, expert) if w.name in ("attention", *work.CORE)]
        behind = sum(rates.seconds(w) for w in attention)
        comm.add("CP", 3 * layers * once, 3 * layers * size, behind=3 * layers * behind)
    if s.ep > 1 and expert:  # dispatch and combine, forward and backward
        size = width * tokens * model.experts.active * model.width / s.tp
        in_node = max(1, device.node // s.tp)
        once = collectives.seconds(device, "all_to_all", size, s.ep, in_node)
        comm.add("EP", 4 * layers * once, 4 * layers * size * collectives.factor("all_to_all", s.ep))


def _tensor_exchanges(model, s, seq, layers, times, expert, rates) -> list[tuple[float, int, float]]:
    """All-reduces of x in a layer, in how many pieces each, behind how many seconds of all `layers`.

    Two forward, two backward, half of them of the feed-forward; with SP each is a gather and a scatter.
    """
    total = 6 if s.recompute == "full" else 4
    if s.overlap_tp == "halves":
        backward = list(work.backward(model, s, seq, 0, expert))
        ways = [*work.forward(model, s, seq, expert), *backward]
        ffn = sum(rates.seconds(w) for w in ways if w.name.startswith(FFN))
        weight = sum(rates.seconds(w) for w in backward if w.name == "qkv, weight")
        attention = [(total / 2 - 0.5, 1, 0.0), (0.5, 1, layers * weight)]  # the half is the scatter of dx
        return [*attention, (total / 4, 2, 0.0), (total / 4, 2, layers * ffn / 2)]
    hidden = {"none": 0, "backward": 2 - s.sp, "all": total}[s.overlap_tp]
    return [(total - hidden, 1, 0.0), (hidden, 1, sum(times))]


def _exchange_ends(comm, model, device, s, seq, rates, width) -> None:
    """Of a vocabulary that tensor parallelism divides, for one micro-batch (arXiv:1909.08053, section 3).

    The embedding's terms are summed, x goes to all parts of the head, and its gradient is summed; of each
    token three float32 numbers make the loss: the largest logit, the sum of exponentials and the target's.
    In a pipeline the last stage sends most of it: what the head needs.
    """
    if s.tp == 1:
        return
    tokens = local_tokens(s, seq)
    size = width * tokens * model.width
    once = collectives.seconds(device, "all_reduce", size, s.tp, device.node)
    wire = size * collectives.factor("all_reduce", s.tp)
    if s.pp == 1:
        comm.add("TP embedding", once, wire)
    # Megatron-LM: the gradient of x behind that of the head's weight; with SP it is half of the exchange
    hidden = (0.5 if s.sp else 1) * (s.overlap_tp in ("backward", "all"))
    weight = next(w for w in work.head(model, s, seq) if w.name == "head, weight")
    comm.add("TP head", (1 - hidden) * once, (1 - hidden) * wire)
    comm.add("TP head", hidden * once, hidden * wire, behind=rates.seconds(weight))
    for numbers in (1, 2):
        size = 4 * numbers * tokens
        once = collectives.seconds(device, "all_reduce", size, s.tp, device.node)
        comm.add("TP loss", once, size * collectives.factor("all_reduce", s.tp))


def _sum_copies(comm, model, device, s, recipe) -> None:
    """Gradients of parameters that several devices have whole, each those of its own tokens: once a step.

    With sequence parallelism of norms and all else that TP does not divide (arXiv:2205.05198, section 4.2.2);
    in a pipeline of an embedding that is the head, too, which both ends have.
    """
    shards = s.shards if s.zero == 3 else 1
    if s.tp > 1 and s.sp:
        mine, undivided = local_parameters(model, s), local_parameters(model, dataclasses.replace(s, tp=1))
        whole = (s.tp * mine - undivided) / (s.tp - 1)  # mine = whole + divided / tp
        size = recipe.gradient * whole / shards
        once = collectives.seconds(device, "all_reduce", size, s.tp, device.node)
        comm.add("TP gradients", once, size * collectives.factor("all_reduce", s.tp))
    if s.pp > 1 and model.tied:
        size = recipe.gradient * model.parameters()["embedding"] / s.tp / shards
        in_node = 2 if s.devices <= device.node else 1
        once = collectives.seconds(device, "all_reduce", size, 2, in_node)
        comm.add("PP embedding", once, size * collectives.factor("all_reduce", 2))


def _gather(comm, device, s, recipe, parameters, layers, times, width, again=True) -> None:
    """FSDP gathers the weights of a layer before forward and before backward, behind the layer before.

    `times` are seconds of all `layers` forward and backward; without `again` weights stay for backward.
    """
    in_node = max(1, device.node // s.tp)
    steps = [("all_gather", width, times[0]), ("reduce_scatter", recipe.gradient, times[1] / 2)]
    if again:
        steps.insert(1, ("all_gather", width, times[1] / 2))
    for collective, bytes_each, behind in steps:
        size = bytes_each * parameters
        once = collectives.seconds(device, collective, size, s.shards, in_node)
        wire = layers * size * collectives.factor(collective, s.shards)
        comm.add("FSDP", layers * once, wire, behind=behind if s.overlap else 0.0)


def _reduce(comm, device, s, recipe, parameters, micro_batch, width) -> None:
    """Gradients of replicas are summed once a step: DDP all-reduces, ZeRO scatters, and gathers weights.

    Behind backward of the last, and forward of the first micro-batch, which takes `micro_batch` seconds.
    """
    if s.shards == 1 or s.zero == 3:
        return
    in_node = max(1, device.node // s.tp)
    steps = [("all_reduce", recipe.gradient, 2 / 3)]
    if s.zero:
        steps = [("reduce_scatter", recipe.gradient, 2 / 3), ("all_gather", width, 1 / 3)]
    for collective, bytes_each, part in steps:
        once = collectives.seconds(device, collective, bytes_each * parameters, s.shards, in_node)
        wire = bytes_each * parameters * collectives.factor(collective, s.shards)
        comm.add("DP gradients", once, wire, part * micro_batch)


def local_parameters(model: Model, s: Strategy, outside: bool = False) -> float:
    """Parameters on the most loaded device: matrices divided by TP and PP, experts by EP too, norms whole.

    The first and last stage hold an embedding each; when the two are tied, each holds a copy.  `outside`:
    only those that belong to no layer.
    """
    parts = model.parameters()
    kinds = ((False, model.layers - model.expert_layers), (True, model.expert_layers))
    layers = sum(n * _layer_parameters(model, s, expert) for expert, n in kinds if n)
    embeddings = [parts["embedding"], parts["output head"] or parts["embedding"]]
    embedded = max(embeddings) if s.pp > 1 else parts["embedding"] + parts["output head"]
    embedded = embedded / s.tp + parts.get("positions", 0)
    norms = model.layers * model.layer_norms()
    rest = (parts["norms"] - norms + parts.get("other", 0)) / s.pp + embedded
    return rest if outside else (layers + norms) / s.pp + rest


def _layer_parameters(model: Model, s: Strategy, expert: bool) -> float:
    """Weights and biases of one layer on one device; biases of outputs that stay whole do, too."""
    return sum(
        local_weights(linear, s)
        + (linear.parameters - linear.weights) / (s.tp if linear.split == "column" else 1)
        for linear in model.linears(expert)
    )
