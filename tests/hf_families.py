"""Hugging Face models that `swap_` is tested with, of any size, without dropout and with random weights."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
VOCABULARY = 101


class Size(NamedTuple):
    width: int = 32
    inner: int = 56
    layers: int = 2
    heads: int = 4
    vocabulary: int = VOCABULARY


FAMILIES = {  # name -> (class, what differs from the common options, whether groups of heads share keys)
    "GPT2": ("GPT2LMHeadModel", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, False),
    "Llama": ("LlamaForCausalLM", {}, True),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 5}, True),
    "Qwen2": ("Qwen2ForCausalLM", {}, True),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}, True),
    "Gemma": ("GemmaForCausalLM", {"head_dim": 8}, True),
    "Phi": ("PhiForCausalLM", {}, False),
    "GPTNeoX": ("GPTNeoXForCausalLM", {}, False),
    "Bert": ("BertForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, False),
    "ModernBert": ("ModernBertForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}, False),
}
CAUSAL = [name for name, (cls, *_) in FAMILIES.items() if "MaskedLM" not in cls]
FUSED_FFN = set(FAMILIES) - {"Bert"}  # whose feed-forward is one module of two or three linears
NORMS = {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"}  # that have an RMSNorm of their own


SMALL = Size()


def options_of(size: Size) -> dict[str, int]:
    """What nearly every configuration of transformers calls these."""
    return dict(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


COMMON = options_of(SMALL)


def build(name: str, size: Size = SMALL, **options: object) -> nn.Module:
    """A model of the family; `options` go into its configuration."""
    cls, own, grouped = FAMILIES[name]
    common = options_of(size)
    if grouped:
        common["num_key_value_heads"] = size.heads // 2
    if "head_dim" in own:
        own = {**own, "head_dim": size.width // size.heads}
    if name == "GPT2":  # whose configuration has names of its own
        names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
                 "num_attention_heads": "n_head"}  # fmt: skip
        common = {names.get(key, key): value for key, value in common.items()}
    config = getattr(transformers, cls.partition("For")[0].removesuffix("LMHeadModel") + "Config")
    return getattr(transformers, cls)(config(**{**common, **own, **options}))


def tokens(batch: int = 2, length: int = 11, vocabulary: int = VOCABULARY) -> Tensor:
    """(batch, length), none of which is special."""
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def labelled(**sizes: int) -> dict[str, Tensor]:
    """A batch from which every family computes a loss."""
    ids = tokens(**sizes)
    return {"input_ids": ids, "labels": ids}


BATCH = labelled()


def run(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients) for the batch."""
    out = model(**BATCH)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(named.values()))
    return out.loss.detach(), out.logits.detach(), dict(zip(named, grads))


def assert_same(a, b) -> None:
    """The same but for roundings; a gradient that cancels is a difference of terms as large as others."""
    torch.testing.assert_close(a[:2], b[:2], rtol=1e-5, atol=5e-6)
    scale = max(g.abs().max().item() for g in b[2].values())
    torch.testing.assert_close(a[2], b[2], rtol=1e-3, atol=2e-5 * scale)


def assert_equal(a, b) -> None:
    """Bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
