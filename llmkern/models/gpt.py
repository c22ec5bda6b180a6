"""GPT-2 and GPT-3 (dense): Radford et al. 2019; Brown et al. 2020, arXiv:2005.14165, sec. 2.1."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as kernel_nn
from ..nn import KVCache


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


class GPT(nn.Module):
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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position, and their loss.

        Args:
            idx: (B, T) token ids; T up to block_size.
            targets: (B, T) the tokens to predict; -100 is ignored.

        Returns:
            (logits, loss): (B, T, V), and the mean cross-entropy in nats, or None without targets.

        Raises:
            ValueError: idx of another shape or dtype, or too long.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, self.loss(logits.flatten(0, 1), targets.flatten())

    def hidden(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """(B, T) token ids to the last hidden states, (B, T, C).

        With `caches`, one a block as `new_caches` makes them, the tokens follow those in the caches.
        """
        if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"GPT: idx is {idx.dtype} of shape {tuple(idx.shape)}, expected integers (batch, length)"
            )
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(
                f"GPT: idx has {length} tokens, expected at most block_size {self.config.block_size}; crop it"
            )
        t = self.transformer
        positions = torch.arange(length, device=idx.device)
        if caches is not None:
            positions = caches[0].lengths[:, None] + positions  # (B, T)
        x = t.drop(t.wte(idx) + t.wpe(positions))  # (B, T, C)
        for block, cache in zip(t.h, caches or [None] * len(t.h)):
            x = block(x, cache)
        return t.ln_f(x)

    def new_caches(self, batch: int, max_length: int, **options: object) -> list[KVCache]:
        """An empty `KVCache` for each block; options dtype and page_size, by default the model's dtype."""
        weight, c = self.transformer.wte.weight, self.config  # the head's may be quantised
        options = {"dtype": weight.dtype, "device": weight.device, **options}
        return [
            KVCache(batch, c.n_head, max_length, c.n_embd // c.n_head, **options) for _ in range(c.n_layer)
        ]

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample tokens one after another; call `eval()` first if the model has dropout.

        Keys and values of what was seen are kept in caches until block_size is full.

        Args:
            idx: (B, T) the prompt, T at least 1; what lies more than block_size back is not seen.
            max_new_tokens: how many to append.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample from the k most likely tokens only.
            generator: source of randomness, on the device of `idx`.

        Returns:
            (B, T + max_new_tokens) token ids.

        Raises:
            ValueError: a negative temperature, top_k below 1, or an empty prompt.
        """
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected 1 or more, or None")
        if idx.numel() == 0:
            raise ValueError(f"generate: idx has shape {tuple(idx.shape)}, expected at least one token")
        caches, new = self._caches_to_generate(idx, max_new_tokens), idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:  # all positions move
                caches, new = None, idx[:, -self.config.block_size :]
            last = self.hidden(new, caches)[:, -1]  # (B, C)
            logits = self.lm_head(last).float()  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                token = _sample(logits / temperature, top_k, generator)
            token = token.to(idx.dtype)
            idx = torch.cat((idx, token), dim=1)
            new = idx if caches is None else token
        return idx

    def _caches_to_generate(self, idx: Tensor, max_new_tokens: int) -> list[KVCache] | None:
        """Caches for the prompt and the new tokens, unless the model is PyTorch alone, or drops at random."""
        kernels = isinstance(self.transformer.h[0], kernel_nn.Block) if len(self.transformer.h) else False
        if not kernels or (self.training and self.config.dropout > 0):
            return None
        length = min(idx.shape[1] + max_new_tokens, self.config.block_size)
        return self.new_caches(len(idx), length)

    def num_params(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


def _sample(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B, 1) tokens."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
