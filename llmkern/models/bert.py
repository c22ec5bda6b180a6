"""A bidirectional encoder for masked language modelling: Devlin et al. 2019, BERT, arXiv:1810.04805.

Without segments and next-sentence prediction, as Liu et al. 2019, RoBERTa, arXiv:1907.11692, sec. 4.2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as kernel_nn

IGNORE = -100  # a target that is not predicted


@dataclass(frozen=True)
class BERTConfig:
    """The shape of a BERT; fields are named as those of `GPTConfig`.

    Attributes:
        vocab_size: V, number of tokens, the mask token included.
        block_size: the longest sequence, in tokens.
        n_layer: L, number of layers.
        n_head: H, attention heads in a layer; divides n_embd.
        n_embd: C, width of the model.
        dropout: probability while training.
        bias: whether linears and norms have biases, as in BERT.
    """

    vocab_size: int = 30522
    block_size: int = 512
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    bias: bool = True

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"BERTConfig: n_head is {self.n_head}, expected a divisor of n_embd, {self.n_embd}"
            )


class BERT(nn.Module):
    """An encoder in which every token sees every other, with a head that predicts masked tokens.

    Args:
        config: its shape.
        kernels: build the layers from `llmkern.nn`; False builds them from `torch.nn`.
    """

    def __init__(self, config: BERTConfig, kernels: bool = True) -> None:
        super().__init__()
        self.config = c = config
        parts = kernel_nn if kernels else nn
        self.tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.positions = nn.Embedding(c.block_size, c.n_embd)
        self.norm = parts.LayerNorm(c.n_embd, bias=c.bias)
        self.drop = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(
            parts.TransformerEncoderLayer(
                c.n_embd, c.n_head, 4 * c.n_embd, c.dropout, "gelu", batch_first=True, bias=c.bias
            )
            for _ in range(c.n_layer)
        )
        self.dense = parts.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.dense_norm = parts.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = parts.Linear(c.n_embd, c.vocab_size)
        self.lm_head.weight = self.tokens.weight
        self.loss = parts.CrossEntropyLoss()
        self.apply(_init_weights)

    def hidden(self, idx: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, T) token ids to the last hidden states, (B, T, C).

        Args:
            idx: T up to block_size.
            padding_mask: (B, T) bool; what is True is not seen.

        Raises:
            ValueError: too many tokens.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f"BERT: idx has {length} tokens, expected at most block_size {limit}; crop it")
        positions = torch.arange(length, device=idx.device)
        x = self.drop(self.norm(self.tokens(idx) + self.positions(positions)))  # (B, T, C)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding_mask)
        return x

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of the true tokens, and their loss.

        Args:
            idx: (B, T) token ids, some of them masked.
            targets: (B, T) the true tokens where they are to be predicted, else -100.

        Returns:
            (logits, loss): without targets (B, T, V) and None; with M of them (M, V), for only those are
            computed, and the mean cross-entropy in nats.
        """
        x = self.hidden(idx)
        if targets is None:
            return self._head(x), None
        chosen = targets != IGNORE
        logits = self._head(x[chosen])  # (M, V)
        return logits, self.loss(logits, targets[chosen])

    def _head(self, x: Tensor) -> Tensor:
        return self.lm_head(self.dense_norm(F.gelu(self.dense(x))))

    def num_params(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02²) for weights and 0 for biases (BERT, sec. A.2)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
