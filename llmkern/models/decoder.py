"""A whole step of generation in one C++ call, for GPT and Llama on CPUs (csrc/decoder.cpp)."""

import weakref
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from .. import nn as kernel_nn
from ..nn import KVCaches, QuantLinear
from ..nn.children import hooked
from ..ops.dispatch import cpu_module, fall_back

MOST_ROWS = 8  # sequences of a step, as in csrc/gemv.h
_decoders: "weakref.WeakKeyDictionary[nn.Module, Decoder]" = weakref.WeakKeyDictionary()


class Decoder:
    """The weights of a model, laid out for steps of one token each.

    Codes of 4 and 8 bits are copied into the order in which they are read, so they take their memory twice;
    dense weights are read where they are.

    Args:
        model: a GPT or Llama for which `why_not` has no reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kernels = cpu_module()
        stack = _llama(model) if hasattr(model, "model") else _gpt(model)
        self._kept = list(_tensors(stack))  # what is not copied
        self._print = _fingerprint(model)
        self.vocab_size = stack["embedding"].shape[0]
        handle = torch.zeros(1, dtype=torch.int64)
        self.kernels.decoder_make(handle, *stack.values())
        self._handle = int(handle)
        weakref.finalize(self, self.kernels.decoder_free, self._handle)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still has the weights of which this was made, and runs on the same kernels."""
        return cpu_module() is self.kernels and _fingerprint(model) == self._print

    def step(self, tokens: Tensor, caches: KVCaches) -> Tensor:
        """Logits after one more token of each sequence.

        Args:
            tokens: (B,) that follow those in the caches, and join them.
            caches: of B sequences.

        Returns:
            (B, V) float32.

        Raises:
            ValueError: a token outside the vocabulary, or a cache that is full.
        """
        logits = torch.empty(len(tokens), self.vocab_size)
        tokens = tokens.to(torch.int64).contiguous()
        for first in range(0, len(tokens), MOST_ROWS):
            part = slice(first, min(first + MOST_ROWS, len(tokens)))
            c = caches if len(tokens) <= MOST_ROWS else caches.rows(part.start, part.stop)
            self.kernels.decoder_step(
                self._handle, tokens[part], c.lengths[0], c.k, c.v, c.k_scale, c.v_scale, c[0].block_table,
                logits[part],
            )  # fmt: skip
        caches.lengths += 1
        return logits


def decoder_of(model: nn.Module, caches: KVCaches) -> Decoder | None:
    """The Decoder of a model, made when it is first asked for; None, and said once, where there is none."""
    if "decoder" not in caches.memo:
        caches.memo["decoder"] = _find(model)
    return caches.memo["decoder"]


def _find(model: nn.Module) -> Decoder | None:
    if reason := why_not(model):
        if next(model.parameters()).device.type == "cpu" and not isinstance(cpu_module(), str):
            fall_back("a step of generation", reason, "op by op")
        return None
    decoder = _decoders.get(model)
    if decoder is None or not decoder.fits(model):
        decoder = _decoders[model] = Decoder(model)
    return decoder


def _fingerprint(model: nn.Module) -> list[tuple]:
    """What changes when a weight does."""
    tensors = chain(model.parameters(), model.buffers())
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _tensors(stack: dict) -> Iterator[Tensor]:
    for value in stack.values():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, Tensor):
                yield item


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


KNOWN = (
    nn.Linear, kernel_nn.Linear, QuantLinear, nn.LayerNorm, kernel_nn.LayerNorm, kernel_nn.RMSNorm,
    nn.Embedding, kernel_nn.Embedding,
)  # fmt: skip


def why_not(model: nn.Module) -> str | None:
    """Why a Decoder cannot run the model, or None."""
    kernels = cpu_module()
    if isinstance(kernels, str):
        return kernels
    if model.training and getattr(model.config, "dropout", 0) > 0:
        return "the model is in training mode and drops; call eval()"
    for path, part in model.named_modules():
        if hooked(part):
            return f"{path or 'the model'} has hooks or a forward of its own"
        if isinstance(part, kernel_nn.plain.Block) and not isinstance(part, kernel_nn.Block):
            return "its layers are those of llmkern.nn.plain; swap_ it"
        if next(part.parameters(recurse=False), None) is not None and type(part) not in KNOWN:
            return f"{path or 'the model'} is a {type(part).__name__}, which the decoder does not know"
    for name, p in model.named_parameters():
        if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {p.dtype} on {p.device}, expected float32, bfloat16 or float16 on the CPU"
        if p.stride(-1) != 1:
            return f"{name} has strides {tuple(p.stride())}, expected 1 at the end"
    return None
