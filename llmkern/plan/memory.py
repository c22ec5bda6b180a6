"""Bytes of one device at the peak of a training step, by part."""

import dataclasses
from dataclasses import dataclass

from .flops import attention_dim
from .model import Model
from .step import local_parameters
from .strategy import Recipe, Strategy
from .work import local_tokens, local_weights

# What the allocator holds beyond live tensors, as a part of them, and what the driver and NCCL take.  The
# part is calibrated once, on the 8 B rows of torchtitan's table (`python -m benchmarks.plan`).
RESERVE = 0.02
CONTEXT = 1.0 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the most loaded device.

    Attributes:
        parts: part -> bytes: weights, gradients, optimizer, activations, and the larger of "logits" (on the
            last stage, when backward begins) and "working" (inside the backward of one layer).
        stage: which stage of the pipeline is the most loaded: "first" or "last".
    """

    parts: dict[str, float]
    stage: str

    @property
    def total(self) -> float:
        """Bytes of live tensors."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> float:
        """Bytes with what the allocator holds besides: what `max_memory_reserved` shows."""
        return self.total * (1 + RESERVE)


def training(model: Model, s: Strategy, recipe: Recipe, batch: int, seq: int, width: int = 2) -> Memory:
    """Memory of a training step; activations take `width` bytes (2: 16 bits, 4: float32)."""
    stages = {"first": _stage(model, s, recipe, batch, seq, width, first=True)}
    if s.pp > 1:
        stages["last"] = _stage(model, s, recipe, batch, seq, width, first=False)
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    return Memory(stages[stage], stage)


def _stage(model, s, recipe, batch, seq, width, first) -> dict[str, float]:
    local = local_parameters(model, s)
    parts = states(local, s, recipe)
    layers = layers_in_flight(model.layers, s, s.micro_batches(batch)) if first else model.layers / s.pp
    dense, moe = model.layers - model.expert_layers, model.expert_layers
    per_layer = {expert: saved(model, s, seq, width, expert) for expert in (False, True)[: 2 if moe else 1]}
    mean = (dense * per_layer[False] + moe * per_layer.get(True, 0)) / model.layers
    parts["activations"] = layers * mean
    embedded = first or s.pp == 1
    if embedded and s.dropout:
        parts["activations"] += local_tokens(s, seq) * model.width / (s.tp if s.sp else 1)
    at_loss = 0.0 if first and s.pp > 1 else logits(model, s, seq, width)
    inside = working(model, s, seq, width)
    parts["logits" if at_loss > inside else "working"] = max(at_loss, inside)
    if s.zero == 3 and s.shards > 1:
        parts["gathered"] = gathered(model, s, recipe, local, width)
        if s.pp > 1:
            parts["stage buffers"] = stage_buffers(model, s, s.micro_batches(batch), seq, width)
    return parts


def states(parameters: float, s: Strategy, recipe: Recipe) -> dict[str, float]:
    """Model states of `parameters` on a device (ZeRO, arXiv:1910.02054, figure 1)."""
    n = s.shards
    return {
        "weights": parameters * recipe.weight / (n if s.zero >= 3 else 1),
        "gradients": parameters * recipe.gradient / (n if s.zero >= 2 else 1),
        "optimizer": parameters * recipe.optimizer / (n if s.zero >= 1 else 1),
    }


def layers_in_flight(layers: float, s: Strategy, micro_batches: int) -> float:
    """Layers of which the first stage holds activations (arXiv:2205.05198, section 4.2.3).

    1F1B: p micro-batches of L/p layers; interleaved: L (1 + (p - 1) / (p v)).
    """
    most = layers * (1 + (s.pp - 1) / (s.pp * s.interleave)) if s.interleave > 1 else layers
    return min(most, layers / s.pp * micro_batches)


def saved(model: Model, s: Strategy, seq: int, width: int, expert: bool = False) -> float:
    """Bytes that one layer keeps for backward, for one micro-batch (arXiv:2205.05198, equations 1 to 6).

    For a GPT with dropout: s b d (10 + 24/t + 5 a s/(d t)), all over t with sequence parallelism, without the
    last term when scores are recomputed or never stored.
    """
    tokens, t = local_tokens(s, seq), s.tp
    whole = t if s.sp else 1
    if s.recompute == "full":
        return width * tokens * model.width / whole
    q, v = attention_dim(model), model.value_dim
    if s.recompute == "ops":
        kept = model.heads * (q + v) + model.kv_heads * v + _inner(model, expert)
        return tokens * (width * (2 * model.width / whole + kept / t) + 4 * model.heads / t)
    norms, inputs = model.norms, min(model.norms, 2)
    outside = width * model.width * (norms + inputs) + 2 * model.width * s.dropout
    attention = model.heads * (q + v) + model.kv_heads * (q + v) + _latents(model) * t
    inside = width * (attention + _ffn(model, s, expert))
    if s.flash:
        inside += 4 * model.heads  # log-sum-exp of a row
    elif s.recompute == "none":
        inside += model.heads * seq * (width + (width + 1) * s.dropout)
    return tokens * (outside / whole + inside / t)


def _inner(model: Model, expert: bool) -> float:
    """Inner width that a token passes through."""
    if not expert:
        return model.ffn
    return model.experts.active * model.experts.width + model.experts.shared


def _ffn(model: Model, s: Strategy, expert: bool) -> float:
    """Elements that the feed-forward keeps: before the activation, and what goes into the second matrix.

    A gated one keeps both halves, the activated half and the product; fused, what goes in alone.
    """
    copies = {(False, False): 2, (False, True): 1, (True, False): 4, (True, True): 2}
    inner = copies[model.gated, s.fused_ffn] * _inner(model, expert)
    return inner + (2 * model.experts.active * model.width if expert else 0)  # what experts get and return


def _latents(model: Model) -> float:
    """Elements of the compressed queries, keys and values, before and after their norms."""
    return 2 * (model.latent.query + model.latent.kv) + model.latent.rope if model.latent else 0


def working(model: Model, s: Strategy, seq: int, width: int) -> float:
    """Bytes that the backward of one layer needs at once, beyond what was saved.

    The layer's own activations where they are recomputed, and the gradients around its widest matrix; with
    sequence parallelism the gathered inputs of attention and feed-forward, too.
    """
    tokens, expert = local_tokens(s, seq), bool(model.experts)
    wide = (2 if model.gated else 1) * _inner(model, expert) / s.tp
    whole = 4 if s.sp and s.tp > 1 else 2
    gradients = width * tokens * (wide + whole * model.width)
    if s.recompute in ("none", "selective"):
        return gradients
    return gradients + saved(model, dataclasses.replace(s, recompute="none"), seq, width, expert)


def logits(model: Model, s: Strategy, seq: int, width: int) -> float:
    """Bytes around the logits when backward begins.

    Eager, they are there in the working precision, as log-probabilities, and as two gradients, the last three
    in float32; over tensor parallelism torch's `loss_parallel` makes one float32 copy more, and the head
    keeps its gathered input.  A fused loss has logits and gradient; a linear one the gradient of its input.
    """
    tokens, d = local_tokens(s, seq), model.width
    if s.loss == "linear":
        return width * tokens * d
    if s.loss == "fused":
        return 2 * width * tokens * model.vocab / s.tp
    split = s.tp > 1
    return (width + 12 + 4 * split) * tokens * model.vocab / s.tp + width * tokens * d * (split and s.sp)


def stage_buffers(model: Model, s: Strategy, micro_batches: int, seq: int, width: int) -> float:
    """Bytes of what stages hand over under torch.distributed.pipelining.

    It allocates buffers for the input and for the gradient of every micro-batch before the step begins.
    """
    hand_over = width * local_tokens(s, seq) * model.width / (s.tp if s.sp else 1)
    return 2 * s.interleave * micro_batches * hand_over


def gathered(model: Model, s: Strategy, recipe: Recipe, local: float, width: int) -> float:
    """Bytes of FSDP beyond its shards: gathered weights and whole gradients, `width` bytes each.

    Two layers (one at work, one fetched ahead) and the root's embeddings; the gradients of one layer as they
    are computed and as they are reduced.  With a pipeline all of the stage stays gathered, and its gradients
    add up whole.
    """
    if s.pp > 1:
        return local * (width + recipe.gradient)
    expert = bool(model.experts)
    layer = sum(local_weights(linear, s) for linear in model.linears(expert))
    parts = model.parameters()
    root = (parts["embedding"] + parts["output head"]) / s.tp
    return width * (2 * layer + root) + (width + recipe.gradient) * max(layer, root / 2)
