"""How a training step is divided over devices, and whether a model can be divided so."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError
from .flops import Recompute
from .model import Model


@dataclass(frozen=True)
class Recipe:
    """What training keeps for a parameter, in bytes.

    Attributes:
        weight: of the copy that computes.
        gradient: of what is accumulated and reduced.
        optimizer: moments, and the float32 master where there is one.
        update: read and written by one update.
        name: as `--recipe` takes it.
    """

    name: str
    weight: int
    gradient: int
    optimizer: int
    update: int

    @property
    def states(self) -> int:
        """Bytes of a parameter in all."""
        return self.weight + self.gradient + self.optimizer


# unscale and look for infinities 12, norm 4, clip 8, Adam 28, copy to 16 bits 6, zero 4
UPDATE = 62
RECIPES = {
    r.name: r
    for r in (
        Recipe("mixed", 2, 2, 12, UPDATE),  # ZeRO, arXiv:1910.02054, section 3.1: 16 bytes
        Recipe("megatron", 2, 4, 12, UPDATE),  # gradients in float32: 18 bytes, arXiv:2205.05198, section 4
        Recipe("float32", 4, 4, 8, 40),
        Recipe("fsdp2", 4, 4, 8, 40),  # float32 shards, computed in 16 bits: MixedPrecisionPolicy
        Recipe("adam8bit", 2, 2, 6, 50),  # moments in 8 bits, arXiv:2110.02861, and a float32 master
        Recipe("sgd", 2, 2, 8, 54),  # one moment and a float32 master
    )
}


@dataclass(frozen=True)
class Strategy:
    """One way to divide a training step.

    Attributes:
        dp: data-parallel replicas.
        tp: tensor parallel (arXiv:1909.08053).
        pp: pipeline stages (arXiv:2104.04473).
        cp: context parallel: parts of a sequence (ring attention, arXiv:2310.01889).
        ep: expert parallel, within dp x cp.
        zero: 0 is DDP, 1 shards the optimizer, 2 gradients too, 3 weights too, as FSDP (arXiv:1910.02054).
        sp: sequence parallel with tp (arXiv:2205.05198, section 4.2.2).
        micro_batch: sequences of one forward.
        interleave: v, model chunks of a device (arXiv:2104.04473, section 2.2).
        recompute: "none", "selective" (scores and softmax, arXiv:2205.05198, section 5), "ops" (all but
            attention and every second product, torchtitan's "selective op") or "full".
        flash: attention never stores its scores (arXiv:2205.14135).
        fused_ffn: the feed-forward keeps what goes into its activation alone (`llmkern.ops.ffn`).
        loss: "eager" (torch), "fused" (`cross_entropy`: logits and their gradient) or "linear"
            (`linear_cross_entropy`: logits are never whole in memory).
        dropout: masks are stored.
        overlap: gradients are reduced while the last backward still runs.
        overlap_tp: exchanges of tensor parallelism behind products: "none", "backward" (that of dx behind
            weight gradients, Megatron-LM since 2022), "halves" (of a feed-forward one half of the tokens
            behind the other, and dx of query, key and value behind weight gradients: `llmkern train`) or
            "all" (in slices, Transformer Engine since 2023).
        fused_sums: weight gradients are added within their product (Megatron-LM since 2022).
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    sp: bool = False
    micro_batch: int = 1
    interleave: int = 1
    recompute: Recompute = "none"
    flash: bool = True
    fused_ffn: bool = False
    loss: Literal["eager", "fused", "linear"] = "eager"
    dropout: bool = False
    overlap: bool = True
    overlap_tp: Literal["none", "backward", "halves", "all"] = "halves"
    fused_sums: bool = True

    @property
    def devices(self) -> int:
        """Devices that it takes."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def shards(self) -> int:
        """Devices that hold the same part of the model: the group of ZeRO."""
        return self.dp * self.cp

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of a device mesh, as `--parallel` takes them.

        It has no ZeRO-1 and 2: fsdp stands for them, which holds no more of the model, and sends more.
        """
        data = {"dp": 1, "fsdp": self.dp} if self.zero else {"dp": self.dp, "fsdp": 1}
        return {**data, "tp": self.tp, "pp": self.pp, "cp": self.cp}

    def micro_batches(self, batch: int) -> int:
        """m, micro-batches of a pipeline in a step of `batch` sequences."""
        return batch // (self.dp * self.micro_batch)

    def __str__(self) -> str:
        kind = {0: "DDP", 1: "ZeRO-1", 2: "ZeRO-2", 3: "FSDP"}[self.zero] if self.shards > 1 else ""
        sizes = ((f"{kind} {self.dp}", self.dp), (f"TP {self.tp}{' SP' * self.sp}", self.tp))
        sizes += ((f"PP {self.pp}{f' x{self.interleave}' * (self.interleave > 1)}", self.pp),)
        sizes += ((f"CP {self.cp}", self.cp), (f"EP {self.ep}", self.ep))
        parts = [text for text, size in sizes if size > 1] or ["1 device"]
        recompute = {"none": "", "selective": ", selective", "ops": ", ops", "full": ", recompute"}[
            self.recompute
        ]
        return f"{' + '.join(parts)}, micro-batch {self.micro_batch}{recompute}"


def check(model: Model, strategy: Strategy, batch: int, seq: int) -> None:
    """Raise unless `strategy` can divide `model` and the batch.

    Raises:
        UserError: what does not divide what.
    """
    s = strategy
    for name in ("dp", "tp", "pp", "cp", "ep", "micro_batch", "interleave"):
        if getattr(s, name) < 1:
            raise UserError(f"{name} is {getattr(s, name)}, expected at least 1")
    per_step = s.dp * s.micro_batch
    expert_width = model.experts.width if model.experts else s.tp
    rules = (
        ("tp", s.tp, "heads", model.heads),
        ("tp", s.tp, "feed-forward width", model.ffn),
        ("tp", s.tp, "width of an expert", expert_width),
        ("pp x interleave", s.pp * s.interleave, "layers", _fill(model.layers, s)),
        ("cp", s.cp, "sequence length", seq),
        ("tp (sequence parallel)", s.tp if s.sp else 1, "sequence length", seq // s.cp),
        ("ep", s.ep, "experts", model.experts.count if model.experts else 1),
        ("ep", s.ep, "dp x cp", s.shards),
        ("dp x micro_batch", per_step, "batch", batch),
    )
    for name, value, what, size in rules:
        if size % value:
            near = max(n for n in range(1, value + 1) if size % n == 0)
            raise UserError(
                f"{name} is {value}, which does not divide {what} {size:,} of {model.name}; nearest is {near}"
            )
    if s.interleave > 1 and (batch // per_step) % s.pp:
        raise UserError(
            f"interleave is {s.interleave}, which needs micro-batches in multiples of pp {s.pp}; "
            f"batch {batch} gives {batch // per_step}"
        )
    if s.zero not in (0, 1, 2, 3):
        raise UserError(f"zero is {s.zero}, expected 0 (DDP), 1, 2 or 3 (FSDP)")
    if s.recompute not in get_args(Recompute):
        raise UserError(f"recompute is {s.recompute!r}, expected one of {', '.join(get_args(Recompute))}")


def _fill(layers: int, s: Strategy) -> int:
    """Layers, with the embedding and the head as two more where that is what makes stages equal.

    Llama 3 has 126 layers for 16 stages of 8: its first and last hold one less (arXiv:2407.21783, 3.3.2).
    """
    stages = s.pp * s.interleave
    return layers if layers % stages == 0 or (layers + 2) % stages else layers + 2
