"""GPT-2 and GPT-3 (dense): Radford et al. 2019; Brown et al. 2020, arXiv:2005.14165, sec. 2.1."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nn as kernel_nn
from ..nn import KVCache, KVCaches
from .causal import CausalLM


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: V, number of tokens; used as it is, not rounded up.
        block_size: the longest sequence, in tokens.
        n_layer: L, number of blocks.
        n_head: H, attention heads in a block; divides n_embd.
        n_embd: C, width of the model.
        activation: of the MLPs; "gelu_tanh" is GPT-2's.
        dropout: probability while training.
        bias: whether linears and norms have biases, as in GPT-2.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    bias: bool = True


class GPT(CausalLM):
    """A decoder-only transformer with learned positions and tied embeddings, in GPT-2's layout.

    Args:
        config: its shape.
        kernels: build the layers from `llmkern.nn`; False builds them from `llmkern.nn.plain`, PyTorch
            alone.  `swap_` and `restore_` turn one into the other.
    """

    def __init__(self, config: GPTConfig, kernels: bool = True) -> None:
        super().__init__()
        self.config = c = config
        parts = kernel_nn if kernels else kernel_nn.plain
        blocks = (parts.Block(c.n_embd, c.n_head, c.activation, c.bias, c.dropout) for _ in range(c.n_layer))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.vocab_size, c.n_embd),
                "wpe": nn.Embedding(c.block_size, c.n_embd),
                "drop": nn.Dropout(c.dropout),
                "h": nn.ModuleList(blocks),
                "ln_f": parts.LayerNorm(c.n_embd, bias=c.bias),
            }
        )
        self.lm_head = parts.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # Press, Wolf 2017, arXiv:1608.05859
        self.loss = parts.CrossEntropyLoss()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02²), and 1/√(2L) of that for what is added to the residual stream (GPT-2, sec. 2.3)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, kernel_nn.plain.Block):
            for linear in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """(B, T) token ids to the last hidden states, (B, T, C).

        With `caches`, one a block as `new_caches` makes them, the tokens follow those in the caches.
        """
        self._check(idx)
        t = self.transformer
        positions = torch.arange(idx.shape[1], device=idx.device)
        if caches is not None:
            positions = caches[0].lengths[:, None] + positions  # (B, T)
        x = t.drop(t.wte(idx) + t.wpe(positions))  # (B, T, C)
        for block, cache in zip(t.h, caches or [None] * len(t.h)):
            x = block(x, cache)
        return t.ln_f(x)

    def new_caches(self, batch: int, max_length: int, **options: object) -> KVCaches:
        """An empty `KVCache` for each block; options dtype and page_size, by default the model's dtype."""
        weight, c = self.transformer.wte.weight, self.config  # the head's may be quantised
        options = {"dtype": weight.dtype, "device": weight.device, **options}
        return KVCaches(c.n_layer, batch, c.n_head, max_length, c.n_embd // c.n_head, **options)

    def _caches_to_generate(self, idx: Tensor, max_new_tokens: int) -> list[KVCache] | None:
        """Caches for the prompt and the new tokens, unless the model is PyTorch alone, or drops at random."""
        kernels = isinstance(self.transformer.h[0], kernel_nn.Block) if len(self.transformer.h) else False
        if not kernels or (self.training and self.config.dropout > 0):
            return None
        return super()._caches_to_generate(idx, max_new_tokens)
