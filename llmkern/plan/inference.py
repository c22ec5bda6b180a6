"""Tokens a second of inference: prefill, then decoding with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import collectives, work
from .flops import attention_dim
from .hardware import Hardware
from .model import Model
from .strategy import Strategy
from .work import E, Work


@dataclass(frozen=True)
class Inference:
    """One replica of the model on `devices` devices, tensor parallel.

    Attributes:
        devices: of one replica.
        weights: bytes of weights a device.
        cache_per_token: bytes of keys and values of one token, all devices.
        cache: bytes a device, at prompt + reply tokens of every sequence.
        most_sequences: that fit beside the weights at that length.
        prefill_seconds, prefill_rate: of the prompts of all sequences; tokens a second.
        decode_seconds, decode_rate: of one token of every sequence, at the mean length; tokens a second.
        prefill_wall, decode_wall: what each waits for.
    """

    devices: int
    sequences: int
    prompt: int
    reply: int
    weights: float
    cache_per_token: float
    cache: float
    most_sequences: int
    prefill_seconds: float
    prefill_rate: float
    prefill_wall: str
    decode_seconds: float
    decode_rate: float
    decode_wall: str


def cache_per_token(model: Model, width: int = E) -> float:
    """Bytes that one token leaves in the cache: 2 L k q, or of MLA L (kv + rope).

    MLA keeps the compressed vector (DeepSeek-V2, arXiv:2405.04434, section 2.1.3).
    """
    if m := model.latent:
        return width * model.layers * (m.kv + m.rope)
    return width * model.layers * model.kv_heads * (model.head_dim + model.value_dim)


def predict(model: Model, device: Hardware, devices: int, sequences: int, prompt: int, reply: int,
            dtype: str = "bfloat16") -> Inference:  # fmt: skip
    """Prefill and decode of `sequences` prompts at once on a replica of `devices` devices."""
    s = Strategy(tp=devices, micro_batch=sequences)
    rates = work.rates(device, dtype)
    weights = E * (model.total / devices)
    per_token = cache_per_token(model)
    # heads of keys and values that are fewer than devices are there more than once
    copies = devices if model.latent else max(1, devices / model.kv_heads)
    cache = sequences * (prompt + reply) * per_token * copies / devices
    room = max(0.0, device.memory - weights) / max(1.0, (prompt + reply) * per_token * copies / devices)
    first = _layers(model, lambda expert: work.forward(model, s, prompt, expert), rates)
    first["communication"] = _all_reduces(model, device, s, sequences * prompt)
    last = _thin("head", sequences, model.vocab / devices, model.width)
    first[rates.wall(last)] += rates.seconds(last)
    later = _layers(model, lambda expert: decode_work(model, s, prompt + reply / 2, expert), rates)
    later["communication"] = _all_reduces(model, device, s, sequences)
    later[rates.wall(last)] += rates.seconds(last)
    times = sum(first.values()), sum(later.values())
    return Inference(
        devices, sequences, prompt, reply, weights, per_token, cache, int(room),
        times[0], sequences * prompt / times[0], max(first, key=first.get),
        times[1], sequences / times[1], max(later, key=later.get),
    )  # fmt: skip


def _layers(model: Model, ops, rates: work.Rates) -> dict[str, float]:
    """Seconds of all layers by wall."""
    total = {"compute": 0.0, "memory": 0.0}
    for expert, layers in ((False, model.layers - model.expert_layers), (True, model.expert_layers)):
        if layers:
            for wall, seconds in rates.walls(ops(expert)).items():
                total[wall] += layers * seconds
    return total


def decode_work(model: Model, s: Strategy, context: float, expert: bool = False) -> Iterator[Work]:
    """The ops of one layer for one new token of every sequence: weights and cache are read once.

    Of a mixture of experts those are read that at least one of the tokens visits, routing taken as random.
    """
    tokens = s.micro_batch
    for linear in model.linears(expert):
        n, k = work.local_size(linear, s.tp)
        if linear.split == "expert":
            visited = linear.count * (1 - (1 - linear.used / linear.count) ** tokens)
            yield _thin(linear.name, tokens * linear.used / visited, n, k, visited)
        else:
            yield _thin(linear.name, tokens, n, k)
    q, v = attention_dim(model), model.value_dim
    kept = cache_per_token(model) / model.layers / (1 if model.latent else min(s.tp, model.kv_heads))
    flops = 2 * tokens * context * model.heads / s.tp * (q + v)
    yield Work("attention", flops, tokens * context * kept)


def _thin(name: str, m: float, n: float, k: float, count: float = 1) -> Work:
    """Products of few rows: kernels for them split the inner dimension, so tiles do not matter."""
    return work.product(name, m, n, k, count)._replace(depth=float("inf"), shape=None)


def _all_reduces(model: Model, device: Hardware, s: Strategy, tokens: float) -> float:
    """Two all-reduces in every layer."""
    size = E * tokens * model.width
    return 2 * model.layers * collectives.seconds(device, "all_reduce", size, s.tp, device.node)
