"""FLOPs of a model, in the three ways that papers count attention.

A multiplication and an addition count as two.  Backward costs twice forward: one product for the gradient of
the input, one for that of the weight (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
"""

from dataclasses import dataclass
from typing import Literal

from .model import Model

Attention = Literal["full", "causal", "left out"]
Recompute = Literal["none", "selective", "ops", "full"]
CONVENTIONS: dict[Attention, tuple[float, str]] = {
    "full": (1.0, "attention counted whole (PaLM appendix B, Megatron papers, nanoGPT, torchtitan)"),
    "causal": (0.5, "attention halved for the causal mask (Megatron-LM today)"),
    "left out": (0.0, "attention left out (6ND; Kaplan et al. 2020)"),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token, forward.

    Attributes:
        layers: matrix products of all layers.
        head: the product with the output embedding.
        attention: scores and their product with the values, whole: 2 L h (q + v) s.
    """

    layers: float
    head: float
    attention: float

    def forward(self, attention: Attention = "full") -> float:
        """FLOPs of a token, forward."""
        return self.layers + self.head + CONVENTIONS[attention][0] * self.attention

    def training(self, attention: Attention = "full") -> float:
        """Model FLOPs of a token, forward and backward: 6N + 12 L h q s when attention is whole."""
        return 3 * self.forward(attention)

    def hardware(self, recompute: Recompute, attention: Attention = "full") -> float:
        """FLOPs that the hardware does for a token: recomputation adds a forward of what it drops.

        Full: all layers again, so 4/3 of them (arXiv:2104.04473, appendix).  Selective: scores and their
        product with the values again (arXiv:2205.05198, section 5).  Ops: every second product again.
        """
        core = CONVENTIONS[attention][0] * self.attention
        again = {"none": 0.0, "selective": core, "ops": self.layers / 2, "full": self.layers + core}
        return self.training(attention) + again[recompute]


def flops(model: Model, seq: int) -> Flops:
    """FLOPs of a token of a sequence of length `seq`."""
    dense = sum(linear.flops for linear in model.linears())
    moe = sum(linear.flops for linear in model.linears(expert=True)) if model.experts else 0
    layers = (model.layers - model.expert_layers) * dense + model.expert_layers * moe
    widths = attention_dim(model) + model.value_dim
    return Flops(layers, 2 * model.width * model.vocab, 2 * model.layers * model.heads * widths * seq)


def attention_dim(model: Model) -> int:
    """Width over which a query and a key are multiplied."""
    return model.latent.nope + model.latent.rope if model.latent else model.head_dim


def mfu(rate: float, peak: float) -> float:
    """Model FLOPs utilisation: model FLOPs/s of a device over its peak (PaLM, arXiv:2204.02311, 4.1)."""
    return rate / peak
