"""A model in numbers: what its layers multiply, and from that its parameters by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import UserError


class Linear(NamedTuple):
    """One matrix of a layer: `inputs` x `outputs`, of which there are `count`, each token using `used`.

    split: how tensor parallelism divides it (Shoeybi et al. 2019, arXiv:1909.08053, section 3): "column" by
    outputs, "row" by inputs, "expert" over expert parallelism, "no" keeps it whole on every device.
    """

    name: str
    inputs: int
    outputs: int
    split: Literal["column", "row", "expert", "no"]
    count: int = 1
    used: float = 1
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.count

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * self.count * self.bias

    @property
    def flops(self) -> float:
        """FLOPs of a token, forward."""
        return 2 * self.inputs * self.outputs * self.used


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
        query: rank of the queries' compression; 0: none.
        kv: rank of the joint compression of keys and values.
        nope, rope: dimensions of a head without and with rotary positions.
        value: dimensions of a head's values.
    """

    query: int
    kv: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Experts:
    """Mixture of experts (Mixtral, arXiv:2401.04088; DeepSeekMoE, arXiv:2401.06066).

    Attributes:
        count: routed experts of a layer.
        active: routed experts that a token visits.
        width: inner width of one.
        shared: inner width of the part that every token visits; 0: none.
        dense_layers: layers at the start (or between) that have an ordinary FFN.
        gate: the shared part has a sigmoid gate of its own (Qwen2-MoE).
        bias: the router has one, which balances the load (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    count: int
    active: int
    width: int
    shared: int = 0
    dense_layers: int = 0
    gate: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Model:
    """A transformer in numbers.  Letters as in docs/plan.md.

    Attributes:
        name: as people write it.
        layers: L.
        width: d.
        heads: h.
        ffn: f, inner width of the feed-forward.
        vocab: V.
        context: the longest sequence it is trained on.
        kv_heads: k, heads of keys and values; h without grouped queries.
        head_dim: q, width of a head.
        gated: the feed-forward is SwiGLU or its like, of three matrices (Shazeer 2020, arXiv:2002.05202).
        bias: linears have biases.
        qkv_bias, out_bias, ffn_bias: those to queries, keys and values, after attention, of the feed-forward
            have, whatever `bias` says.
        norm: parameters of a norm in units of d: 2 LayerNorm, 1 RMSNorm.
        norms: norms in a layer: 2; 1 when attention and FFN run side by side, 4 in Gemma 2.
        qk_norm: parameters of norms on queries and keys in one layer.
        positions: learned positions; 0 for rotary or ALiBi.
        tied: output and input embedding are one matrix.
        causal: attention looks back only.
        final_norm: a norm after the last layer.
        embedding_norm: a norm after the embedding (BERT, BLOOM).
        extra: parameters besides: token types, pooler, output bias.
        latent: MLA in place of grouped queries.
        experts: mixture of experts.
        source: where the numbers come from.
        notes: what was assumed, for the reader.
    """

    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    vocab: int
    context: int
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm: int = 2
    norms: int = 2
    qk_norm: int = 0
    positions: int = 0
    tied: bool = True
    causal: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    extra: int = 0
    latent: Latent | None = None
    experts: Experts | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocab", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name} is {getattr(self, name)}, expected at least 1")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(
                f"model: heads is {self.heads}, kv_heads {self.kv_heads}; expected a multiple of it"
            )

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers with a mixture of experts."""
        return self.layers - self.experts.dense_layers if self.experts else 0

    def attention_linears(self) -> Iterator[Linear]:
        """The matrices of one attention."""
        d, h, bias = self.width, self.heads, self.bias
        if m := self.latent:
            if m.query:
                yield Linear("query down", d, m.query, "no")
            yield Linear("query up", m.query or d, h * (m.nope + m.rope), "column")
            yield Linear("kv down", d, m.kv + m.rope, "no")
            yield Linear("kv up", m.kv, h * (m.nope + m.value), "column")
        else:
            outputs = (h + 2 * self.kv_heads) * self.head_dim
            yield Linear("qkv", d, outputs, "column", bias=bias or self.qkv_bias)
        yield Linear("attention out", h * self.value_dim, d, "row", bias=bias or self.out_bias)

    def ffn_linears(self, expert: bool) -> Iterator[Linear]:
        """The matrices of one feed-forward, `expert`: of one with a mixture of experts."""
        d, times = self.width, 2 if self.gated else 1
        if not expert:
            bias = self.bias or self.ffn_bias
            yield Linear("ffn in", d, times * self.ffn, "column", bias=bias)
            yield Linear("ffn out", self.ffn, d, "row", bias=bias)
            return
        m = self.experts
        yield Linear("router", d, m.count, "no", bias=m.bias)
        yield Linear("experts in", d, times * m.width, "expert", m.count, m.active)
        yield Linear("experts out", m.width, d, "expert", m.count, m.active)
        if m.shared:
            yield Linear("shared in", d, times * m.shared, "column")
            yield Linear("shared out", m.shared, d, "row")
        if m.gate:
            yield Linear("shared gate", d, 1, "no")

    def linears(self, expert: bool = False) -> list[Linear]:
        """All matrices of one layer."""
        return [*self.attention_linears(), *self.ffn_linears(expert)]

    def layer_norms(self) -> int:
        """Parameters of the norms in one layer."""
        latent = self.latent.query + self.latent.kv if self.latent else 0
        return self.norms * self.norm * self.width + self.qk_norm + latent

    def parameters(self) -> dict[str, int]:
        """Parameters by part; their sum is N."""
        dense, moe = self.layers - self.expert_layers, self.expert_layers
        ffn = [list(self.ffn_linears(False)), list(self.ffn_linears(True)) if moe else []]
        routed = sum(linear.parameters for linear in ffn[1] if linear.split == "expert")
        norms = self.layers * self.layer_norms()
        norms += (self.final_norm + self.embedding_norm) * self.norm * self.width
        parts = {
            "embedding": self.vocab * self.width,
            "positions": self.positions * self.width,
            "attention": self.layers * sum(linear.parameters for linear in self.attention_linears()),
            "feed-forward": dense * sum(linear.parameters for linear in ffn[0])
            + moe * (sum(linear.parameters for linear in ffn[1]) - routed),
            "experts": moe * routed,
            "norms": norms,
            "output head": 0 if self.tied else self.vocab * self.width,
            "other": self.extra,
        }
        return {part: count for part, count in parts.items() if count or part == "output head"}

    @property
    def total(self) -> int:
        """N, all parameters."""
        return sum(self.parameters().values())

    @property
    def active(self) -> int:
        """Parameters that one token uses: all but the experts it does not visit."""
        if not self.experts:
            return self.total
        m = self.experts
        return self.total - self.parameters()["experts"] * (m.count - m.active) // m.count
