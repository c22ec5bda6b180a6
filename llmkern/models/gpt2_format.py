"""GPT-2 as Hugging Face keeps it: `GPT2LMHeadModel`.

Names are those of `GPT`; the linears of the blocks are transposed there (Conv1D).
"""

import re
from typing import Any

from torch import Tensor

from .gpt import GPT, GPTConfig
from .pretrained_format import Format, expect, number

ACTIVATIONS = {  # theirs -> ours; the first of each of ours is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")  # buffers of old files
PREFIX = "transformer."


def read_config(fields: dict[str, Any]) -> GPTConfig:
    width = number(fields, "n_embd", 768)
    expect(fields, "n_inner", (None, 4 * width), None)
    expect(fields, "layer_norm_epsilon", (1e-5,), 1e-5)
    expect(fields, "scale_attn_weights", (True,), True)
    expect(fields, "scale_attn_by_inverse_layer_idx", (False,), False)
    expect(fields, "add_cross_attention", (False,), False)
    expect(fields, "tie_word_embeddings", (True,), True)
    expect(fields, "activation_function", tuple(ACTIVATIONS), "gelu_new")
    return GPTConfig(
        vocab_size=number(fields, "vocab_size", 50257),
        block_size=number(fields, "n_positions", 1024),
        n_layer=number(fields, "n_layer", 12),
        n_head=number(fields, "n_head", 12),
        n_embd=width,
        activation=ACTIVATIONS[fields.get("activation_function", "gelu_new")],
        dropout=float(fields.get("resid_pdrop", 0.1)),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    theirs = next((name for name, ours in ACTIVATIONS.items() if ours == config.activation), None)
    if theirs is None:
        raise ValueError(
            f"save_pretrained: activation is {config.activation!r}, which Hugging Face's GPT-2 has not; "
            f"expected one of {', '.join(sorted(set(ACTIVATIONS.values())))}"
        )
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": theirs,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }


def read_tensor(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    name = name.removeprefix(PREFIX)  # a bare GPT2Model has none
    if MASKS.match(name):
        return None
    if name == "lm_head.weight":
        return name, tensor
    return PREFIX + name, tensor.t() if CONV1D.match(name) else tensor


def write_tensors(model: GPT) -> dict[str, Tensor]:
    tensors = dict(model.transformer.state_dict(prefix=PREFIX))
    if not model.config.bias:
        tensors |= {
            name.removesuffix("weight") + "bias": weight.new_zeros(weight.shape[0])
            for name, weight in tensors.items()
            if not re.search(r"w[tp]e\.", name)
        }
    return {name: t.t() if CONV1D.match(name.removeprefix(PREFIX)) else t for name, t in tensors.items()}


FORMAT = Format(("gpt2",), GPT, GPTConfig, read_config, write_config, read_tensor, write_tensors, "n_layer")
