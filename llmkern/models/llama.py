"""The Llama family: Llama 1 to 3, Mistral, Qwen 2 and 3, SmolLM; modules are named as in Hugging Face's.

Touvron et al. 2023, LLaMA, arXiv:2302.13971; Grattafiori et al. 2024, Llama 3, arXiv:2407.21783; Jiang et al.
2023, Mistral 7B, arXiv:2310.06825; Yang et al. 2025, Qwen3, arXiv:2505.09388.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import nn as kernel_nn
from ..nn import KVCache, KVCaches, LlamaAttention, LlamaBlock, LlamaMLP, RotaryEmbedding
from .causal import CausalLM


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; fields and defaults are named as in Hugging Face's configs.

    Attributes:
        vocab_size: V, number of tokens.
        hidden_size: C, width of the model.
        intermediate_size: F, width inside the MLPs.
        num_hidden_layers: L, number of blocks.
        num_attention_heads: H.
        num_key_value_heads: H_kv, divides H; None is H.
        head_dim: D, even; None is C / H.
        max_position_embeddings: the longest sequence, in tokens.
        rms_norm_eps: added to the mean square inside the norms' root.
        rope_theta: base of the rotary frequencies.
        rope_scaling: as in a Hugging Face config; see `llmkern.ops.rope_frequencies`.
        tie_word_embeddings: whether lm_head has the embedding's weight.
        attention_bias: whether q_proj, k_proj and v_proj have biases (Qwen 2).
        output_bias: whether o_proj has one.
        mlp_bias: whether the linears of the MLPs have.
        qk_norm: whether queries and keys go through an RMSNorm of each head (Qwen 3).
        sliding_window: tokens that a query sees, itself included; None is all before it (Mistral).
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"LlamaConfig: num_key_value_heads is {kv_heads}, expected a divisor of "
                f"num_attention_heads, {heads}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads is {heads}, expected a divisor of hidden_size, "
                f"{self.hidden_size}, or a head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim is {head_dim}, expected an even number of at least 2")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"LlamaConfig: sliding_window is {self.sliding_window}, expected at least 1, or None"
            )
        object.__setattr__(self, "num_key_value_heads", kv_heads)
        object.__setattr__(self, "head_dim", head_dim)

    @property
    def block_size(self) -> int:
        """max_position_embeddings, by the name that a GPTConfig has for it."""
        return self.max_position_embeddings


class Llama(CausalLM):
    """A decoder-only transformer with rotary positions, RMSNorm and gated MLPs.

    Its state_dict has the keys of Hugging Face's LlamaForCausalLM, Qwen2ForCausalLM and so on; `swap_` turns
    theirs into models on the same kernels, so there is no second one in PyTorch alone here.

    Args:
        config: its shape.

    Attributes:
        model: embed_tokens, layers and norm.
        rotary: the RotaryEmbedding that all layers share.
        lm_head: Linear from C to V.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                "layers": nn.ModuleList(_block(c) for _ in range(c.num_hidden_layers)),
                "norm": kernel_nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps),
            }
        )
        self.rotary = RotaryEmbedding(
            c.head_dim, c.max_position_embeddings, c.rope_theta, scaling=c.rope_scaling
        )
        self.lm_head = kernel_nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight  # Press, Wolf 2017, arXiv:1608.05859
        self.loss = kernel_nn.CrossEntropyLoss()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02²), and 1/√(2L) of that for what is added to the residual stream (GPT-2, sec. 2.3)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, LlamaBlock):
            for linear in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))

    def hidden(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """(B, T) token ids to the last hidden states, (B, T, C).

        With `caches`, one a block as `new_caches` makes them, the tokens follow those in the caches.
        """
        self._check(idx)
        x = self.model.embed_tokens(idx)  # (B, T, C)
        for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers)):
            x = layer(x, self.rotary, cache)
        return self.model.norm(x)

    def new_caches(self, batch: int, max_length: int, **options: object) -> KVCaches:
        """An empty `KVCache` for each block; options dtype and page_size, by default the model's dtype."""
        weight, c = self.model.embed_tokens.weight, self.config  # linears may be quantised
        options = {"dtype": weight.dtype, "device": weight.device, **options}
        return KVCaches(c.num_hidden_layers, batch, c.num_key_value_heads, max_length, c.head_dim, **options)


def _block(c: LlamaConfig) -> LlamaBlock:
    attention = LlamaAttention(
        c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias,
        c.output_bias, c.rms_norm_eps if c.qk_norm else None, c.sliding_window,
    )  # fmt: skip
    return LlamaBlock(
        attention, LlamaMLP(c.hidden_size, c.intermediate_size, c.mlp_bias), c.hidden_size, c.rms_norm_eps
    )
