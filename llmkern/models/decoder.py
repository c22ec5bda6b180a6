"""A whole step of generation in one C++ call, for GPT and Llama on CPUs (csrc/decoder.cpp)."""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import nn as kernel_nn
from ..nn import KVCache, QuantLinear
from ..nn.children import hooked
from ..ops.dispatch import cpu_module

MOST_ROWS = 8  # sequences of a step


class StackedCaches(list):
    """A `KVCache` for each layer, which are parts of one tensor.

    Attributes:
        k, v: (L, B, H_kv, S, D).
        lengths: (L, B) int32.
    """

    def __init__(self, caches: list[KVCache]) -> None:
        super().__init__(caches)
        self.k, self.v = (torch.stack([getattr(c, name) for c in caches]) for name in ("k", "v"))
        self.lengths = torch.stack([c.lengths for c in caches])
        for i, cache in enumerate(caches):
            cache.k, cache.v, cache.lengths = self.k[i], self.v[i], self.lengths[i]


class Decoder:
    """The weights of a model, laid out for steps of one token each.

    Codes of 4 and 8 bits are copied into the order in which they are read, so they take their memory twice;
    dense weights are read where they are.

    Args:
        model: a GPT or Llama for which `why_not` has no reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kernels = cpu_module()
        stack = _llama(model) if hasattr(model, "model") else _gpt(model)
        self._kept = [t for t in _tensors(stack) if t is not None]
        self._versions = [t._version for t in self._kept]
        self.vocab_size = stack["embedding"].shape[0]
        handle = torch.zeros(1, dtype=torch.int64)
        self._kernels.decoder_make(handle, *stack.values())
        self._handle = int(handle)
        weakref.finalize(self, self._kernels.decoder_free, self._handle)

    def fresh(self) -> bool:
        """Whether no weight was written to since."""
        return [t._version for t in self._kept] == self._versions

    def step(self, tokens: Tensor, caches: StackedCaches) -> Tensor:
        """(B,) int64 tokens that follow those in the caches, and join them, to logits (B, V) float32."""
        logits = torch.empty(len(tokens), self.vocab_size)
        self._kernels.decoder_step(
            self._handle, tokens.contiguous(), caches.lengths[0], caches.k, caches.v, logits
        )
        caches.lengths += 1
        return logits


def _tensors(stack: dict) -> Iterator[Tensor | None]:
    for value in stack.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from value


def _linear(linear: nn.Module | None, rows: slice = slice(None)) -> list[Tensor | None]:
    """Weight, scales, mins and bias of some rows."""
    if linear is None:
        return [None] * 4
    if isinstance(linear, QuantLinear):
        parts = [linear.qweight, linear.scales, linear.mins, linear.bias]
    else:
        parts = [linear.weight, None, None, linear.bias]
    return [None if p is None else p.detach()[rows] for p in parts]


def _norm(norm: nn.Module | None) -> list[Tensor | None]:
    if norm is None:
        return [None, None]
    bias = getattr(norm, "bias", None)
    return [norm.weight.detach(), None if bias is None else bias.detach()]


def _llama(model: nn.Module) -> dict:
    c, layers = model.config, []
    for block in model.model.layers:
        a, mlp = block.self_attn, block.mlp
        for norm in (block.input_layernorm, block.post_attention_layernorm, a.q_norm, a.k_norm):
            layers += _norm(norm)
        for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            layers += _linear(linear)
    return {
        "embedding": model.model.embed_tokens.weight.detach(), "positions": None,
        "cos": model.rotary.cos, "sin": model.rotary.sin, "layers": layers,
        "last": _norm(model.model.norm) + _linear(model.lm_head),
        "heads": c.num_attention_heads, "kv_heads": c.num_key_value_heads, "dim": c.head_dim,
        "centered": False, "eps": c.rms_norm_eps, "activation": "silu",
        "left": None if c.sliding_window is None else c.sliding_window - 1,
    }  # fmt: skip


def _gpt(model: nn.Module) -> dict:
    t, c, layers = model.transformer, model.config, []
    for block in t.h:
        for norm in (block.ln_1, block.ln_2, None, None):
            layers += _norm(norm)
        for i in range(3):
            layers += _linear(block.attn.c_attn, slice(i * c.n_embd, (i + 1) * c.n_embd))
        for linear in (block.attn.c_proj, None, block.mlp.c_fc, block.mlp.c_proj):
            layers += _linear(linear)
    return {
        "embedding": t.wte.weight.detach(), "positions": t.wpe.weight.detach(), "cos": None, "sin": None,
        "layers": layers, "last": _norm(t.ln_f) + _linear(model.lm_head),
        "heads": c.n_head, "kv_heads": c.n_head, "dim": c.n_embd // c.n_head,
        "centered": True, "eps": t.ln_f.eps, "activation": c.activation, "left": None,
    }  # fmt: skip


PLAIN = (
    nn.Linear, kernel_nn.Linear, QuantLinear, nn.LayerNorm, kernel_nn.LayerNorm, kernel_nn.RMSNorm,
    nn.Embedding, kernel_nn.Embedding,
)  # fmt: skip


def why_not(model: nn.Module) -> str | None:
    """Why a Decoder cannot run the model, or None."""
    module = cpu_module()
    if isinstance(module, str):
        return module
    for path, part in model.named_modules():
        if hooked(part):
            return f"{path or 'the model'} has hooks or a forward of its own"
        if next(part.children(), None) is None and any(True for _ in part.parameters()) and type(part) not in PLAIN:
            return f"{path} is a {type(part).__name__}, which it does not know"
    for name, p in model.named_parameters():
        if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {p.dtype} on {p.device}, expected float32, bfloat16 or float16 on the CPU"
        if p.stride(-1) != 1:
            return f"{name} has strides {tuple(p.stride())}, expected 1 at the end"
    return None
