"""The Llama family as Hugging Face keeps it: Llama, Mistral, Qwen 2 and Qwen 3, each `...ForCausalLM`.

Names and tensors are those of our `Llama`.
"""

from typing import Any

from torch import Tensor

from ..errors import UserError
from .llama import Llama, LlamaConfig
from .pretrained_format import Format, expect, number

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(fields: dict[str, Any]) -> LlamaConfig:
    kind = fields["model_type"]
    expect(fields, "hidden_act", ("silu",), "silu")
    expect(fields, "partial_rotary_factor", (None, 1, 1.0), None)
    qwen2, both = kind == "qwen2", kind in ("llama", "qwen3")  # who may have biases in the attention
    bias = both and bool(fields.get("attention_bias", False))
    heads = number(fields, "num_attention_heads")
    theta, scaling = _rope(fields)
    return LlamaConfig(
        **{key: number(fields, key) for key in SAME},
        num_key_value_heads=number(fields, "num_key_value_heads", heads),
        head_dim=fields.get("head_dim") or (128 if kind == "qwen3" else None),
        max_position_embeddings=number(fields, "max_position_embeddings", 2048),
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=qwen2 or bias,
        output_bias=bias,
        mlp_bias=kind == "llama" and bool(fields.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=_window(fields, kind),
    )


def _rope(fields: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies: rope_parameters of transformers 5, or what was before."""
    scaling = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return float(theta), None if kind == "default" else scaling


def _window(fields: dict[str, Any], kind: str) -> int | None:
    """Mistral has one window in all layers; Qwen's may differ from layer to layer, which ours cannot."""
    if kind == "mistral":
        return fields.get("sliding_window", 4096)  # their default
    kinds = set(fields.get("layer_types") or ())
    if fields.get("use_sliding_window", False) or kinds - {"full_attention"}:
        raise UserError(
            f"config.json: some layers of this {kind} have a sliding window, expected none: llmkern's "
            "model has one window, or none, in all layers"
        )
    return None


def write_config(config: LlamaConfig) -> dict[str, Any]:
    c, kind = config, _kind(config)
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    fields = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        **{key: getattr(c, key) for key in SAME},
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,  # transformers 4 reads these two, 5 the third
        "rope_scaling": c.rope_scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = c.attention_bias
    if kind == "llama":
        fields["mlp_bias"] = c.mlp_bias
    if kind == "mistral":
        fields["sliding_window"] = c.sliding_window
    return fields


def _kind(c: LlamaConfig) -> str:
    """The one of their models that has these options."""
    biases = c.attention_bias, c.output_bias
    plain = not c.mlp_bias and c.sliding_window is None
    if c.qk_norm and plain and biases[0] == biases[1]:
        return "qwen3"
    if not c.qk_norm and plain and biases == (True, False):
        return "qwen2"
    if not c.qk_norm and c.sliding_window is None and biases[0] == biases[1]:
        return "llama"
    if not c.qk_norm and not c.mlp_bias and biases == (False, False):
        return "mistral"
    raise ValueError(
        f"save_pretrained: qk_norm is {c.qk_norm}, attention_bias {c.attention_bias}, output_bias "
        f"{c.output_bias}, mlp_bias {c.mlp_bias} and sliding_window {c.sliding_window}, expected options of "
        "one of Llama, Mistral, Qwen 2 and Qwen 3"
    )


def read_tensor(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    return None if name.endswith("rotary_emb.inv_freq") else (name, tensor)  # a buffer of old files


def write_tensors(model: Llama) -> dict[str, Tensor]:
    return dict(model.named_parameters())  # of tied ones the first name alone


FORMAT = Format(
    tuple(CLASSES), Llama, LlamaConfig, read_config, write_config, read_tensor, write_tensors,
    "num_hidden_layers",
)  # fmt: skip
