"""The parts of a GPT in PyTorch alone: what `swap_` starts from and `restore_` goes back to.

Each class has a subclass of the same name in `llmkern.nn` that computes the same with kernels.
Names follow GPT-2 and nanoGPT: c_attn, c_fc, c_proj, ln_1, ln_2.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss, LayerNorm, Linear

from ..ops.activation import GATED

__all__ = ["MLP", "Block", "CausalSelfAttention", "CrossEntropyLoss", "GatedMLP", "LayerNorm", "Linear"]


def relu2(x: Tensor) -> Tensor:
    """relu(x)²; So et al. 2021, Primer, arXiv:2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu2": relu2,
}


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it.

    Args:
        n_embd: C, width of the model.
        n_head: number of query heads; divides n_embd.
        n_kv_head: number of key and value heads, shared by groups of query heads; None is n_head.
        bias: whether the linears have biases.
        dropout: probability of dropping attention weights, and outputs, while training.

    Attributes:
        c_attn: Linear from C to query, key and value side by side, C + 2 · n_kv_head · C / n_head.
        c_proj: Linear from C to C.
        resid_dropout: Dropout of the output.
    """

    linear = Linear  # the class of c_attn and c_proj

    def __init__(
        self, n_embd: int, n_head: int, n_kv_head: int | None = None, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head < 1 or n_embd % n_head:
            raise ValueError(
                f"CausalSelfAttention: n_head is {n_head}, expected a divisor of n_embd, {n_embd}"
            )
        if n_kv_head < 1 or n_head % n_kv_head:
            raise ValueError(
                f"CausalSelfAttention: n_kv_head is {n_kv_head}, expected a divisor of n_head, {n_head}"
            )
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.dropout = dropout
        self.c_attn = self.linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim, bias)
        self.c_proj = self.linear(n_embd, n_embd, bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """Attend over x, (B, T, C), and the tokens before it in `cache`, a `KVCache`; returns (B, T, C)."""
        heads = self.c_attn(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 H_kv, D)
        # split before the transpose: then backward joins the gradients in one copy
        parts = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        y = self.attend(q, k, v) if cache is None else cache.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q, (B, H, T, D), on k and v, (B, H_kv, T, D); returns (B, H, T, D)."""
        return F.scaled_dot_product_attention(
            q, k, v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
        )  # fmt: skip


class MLP(nn.Module):
    """Linear, activation, linear.

    Args:
        n_embd: C, width of the model.
        hidden: F, width between the linears; None is 4 C.
        activation: "relu", "gelu" (exact), "gelu_tanh" (GPT-2's), "silu" or "relu2".
        bias: whether the linears have biases.
        dropout: probability of dropping outputs while training.

    Attributes:
        c_fc: Linear from C to F.
        c_proj: Linear from F to C.
        dropout: Dropout of the output.
    """

    def __init__(
        self,
        n_embd: int,
        hidden: int | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_activation("MLP", activation, ACTIVATIONS)
        hidden = 4 * n_embd if hidden is None else hidden
        self.activation = activation
        self.c_fc = nn.Linear(n_embd, hidden, bias)
        self.c_proj = nn.Linear(hidden, n_embd, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions."""
        h = ACTIVATIONS[self.activation](self.c_fc(x))  # (B, T, F)
        return self.dropout(self.c_proj(h))


class GatedMLP(nn.Module):
    """Linear times activated gate, linear; Shazeer 2020, arXiv:2002.05202.

    Args:
        n_embd: C, width of the model.
        hidden: F; None is 8 C / 3, which gives as many parameters as `MLP` has with 4 C.
        activation: "swiglu", "geglu" (exact gelu) or "reglu".
        bias: whether the linears have biases.
        dropout: probability of dropping outputs while training.

    Attributes:
        c_gate, c_fc: Linears from C to F; the activation is applied to c_gate's output.
        c_proj: Linear from F to C.
        dropout: Dropout of the output.
    """

    def __init__(
        self,
        n_embd: int,
        hidden: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_activation("GatedMLP", activation, GATED)
        hidden = 8 * n_embd // 3 if hidden is None else hidden
        self.activation = activation
        self.c_gate = nn.Linear(n_embd, hidden, bias)
        self.c_fc = nn.Linear(n_embd, hidden, bias)
        self.c_proj = nn.Linear(hidden, n_embd, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions."""
        h = ACTIVATIONS[GATED[self.activation]](self.c_gate(x)) * self.c_fc(x)  # (B, T, F)
        return self.dropout(self.c_proj(h))


def _check_activation(name: str, activation: str, known: dict) -> None:
    if activation not in known:
        raise ValueError(f"{name}: activation is {activation!r}, expected one of {', '.join(known)}")


class Block(nn.Module):
    """One layer of GPT-2: attention and MLP, each after a LayerNorm and added to its input.

    Args:
        n_embd, n_head, activation, bias, dropout: as in `CausalSelfAttention` and `MLP`.

    Attributes:
        ln_1, attn: LayerNorm and CausalSelfAttention.
        ln_2, mlp: LayerNorm and MLP.
    """

    parts = LayerNorm, CausalSelfAttention, MLP

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        activation: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        norm, attention, mlp = self.parts
        self.ln_1 = norm(n_embd, bias=bias)
        self.attn = attention(n_embd, n_head, bias=bias, dropout=dropout)
        self.ln_2 = norm(n_embd, bias=bias)
        self.mlp = mlp(n_embd, activation=activation, bias=bias, dropout=dropout)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """(B, T, C) to (B, T, C); the attention also sees the tokens in `cache`, a `KVCache`."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))
