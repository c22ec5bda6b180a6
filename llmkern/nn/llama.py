"""The parts of a Llama, named as Hugging Face names them: LlamaAttention, LlamaMLP, LlamaBlock."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .children import hooked, must_call, unfused
from .decode import KVCache
from .ffn import fused
from .linear import Linear
from .norm import RMSNorm, add_norm
from .rope import RotaryEmbedding


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions and shared key heads.

    Args:
        hidden_size: C, width of the model.
        n_head: H, query heads.
        n_kv_head: H_kv, key and value heads; divides n_head.
        head_dim: D.
        bias: whether q_proj, k_proj and v_proj have biases (Qwen2).
        output_bias: whether o_proj has one.
        qk_norm_eps: with a number, queries and keys go through an RMSNorm of each head first (Qwen3).
        window: tokens that a query sees, itself included; None is all before it (Mistral).

    Attributes:
        q_proj, k_proj, v_proj, o_proj: Linears from C to H D, H_kv D, H_kv D, and from H D to C.
        q_norm, k_norm: RMSNorms of D, or None.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864; Ainslie et al. 2023, GQA, arXiv:2305.13245.
    """

    def __init__(
        self,
        hidden_size: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.window = n_head, n_kv_head, head_dim, window
        self.q_proj = Linear(hidden_size, n_head * head_dim, bias)
        self.k_proj = Linear(hidden_size, n_kv_head * head_dim, bias)
        self.v_proj = Linear(hidden_size, n_kv_head * head_dim, bias)
        self.o_proj = Linear(n_head * head_dim, hidden_size, output_bias)
        norms = qk_norm_eps is not None
        self.q_norm = RMSNorm(head_dim, eps=qk_norm_eps) if norms else None
        self.k_norm = RMSNorm(head_dim, eps=qk_norm_eps) if norms else None

    def forward(self, x: Tensor, rotary: RotaryEmbedding, cache: KVCache | None = None) -> Tensor:
        """Attend over x, (B, T, C), and the tokens before it in `cache`; returns (B, T, C)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H or H_kv, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is None:
            q, k = rotary(q, k)
            y = self.attend(q, k, v)  # (B, H, T, D)
        else:
            y = cache.attend(q, k, v, cos=rotary.cos, sin=rotary.sin, window=self._span())
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q, (B, H, T, D), on k and v, (B, H_kv, T, D); returns (B, H, T, D)."""
        return ops.attention(q, k, v, is_causal=True, window=self._span())

    def _span(self) -> tuple[int, int] | None:
        return None if self.window is None else (self.window - 1, 0)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) ∘ up(x)) as one fused op; Shazeer 2020, arXiv:2002.05202.

    Args:
        hidden_size: C, width of the model.
        intermediate_size: F.
        bias: whether the linears have biases.

    Attributes:
        gate_proj, up_proj: Linears from C to F.
        down_proj: Linear from F to C.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(*, C) to (*, C); `residual` is added to the result."""
        linears = {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}
        if reason := must_call(**linears):
            unfused("LlamaMLP", reason, *linears.values())
            y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return y if residual is None else residual + y
        return fused(x, self.up_proj, "swiglu", self.down_proj, self.gate_proj, residual=residual)


class LlamaBlock(nn.Module):
    """One layer of a Llama: attention and gated MLP, each after an RMSNorm and added to its input.

    The adds run inside the kernels of the second norm and of the MLP.

    Args:
        attention: the LlamaAttention.
        mlp: the LlamaMLP.
        hidden_size: C.
        eps: of the norms.

    Attributes:
        input_layernorm, self_attn: RMSNorm and LlamaAttention.
        post_attention_layernorm, mlp: RMSNorm and LlamaMLP.
    """

    def __init__(self, attention: LlamaAttention, mlp: LlamaMLP, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = RMSNorm(hidden_size, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor, rotary: RotaryEmbedding, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) to (B, T, C); the attention also sees the tokens in `cache`."""
        y = self.self_attn(self.input_layernorm(x), rotary, cache)
        y, x = add_norm(self.post_attention_layernorm, y, x)
        if type(self.mlp) is LlamaMLP and not hooked(self.mlp):
            return self.mlp(y, x)
        return x + self.mlp(y)
