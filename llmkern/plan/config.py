"""Models from a Hugging Face config.json, from our presets, and by published name."""

import dataclasses
import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models import LLAMA_PRESETS, PRESETS, GPTConfig, LlamaConfig
from .model import Experts, Latent, Model

# key of the plan <- the names that configurations have for it
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model", "n_embed", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_size"),
}
LLAMA = {"gated": True, "bias": False, "norm": 1, "tied": False}
GPT_LIKE = {"gated": False, "bias": True, "norm": 2, "tied": True}
# model_type -> what its configuration does not say; "positions": learned ones beyond the context
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT_LIKE, "positions": 0},
    "gpt_neo": {**GPT_LIKE, "positions": 0, "qkv_bias": False},
    "bert": {**GPT_LIKE, "positions": 0, "causal": False, "final_norm": False, "embedding_norm": True},
    "opt": {**GPT_LIKE, "positions": 2},
    "bloom": {**GPT_LIKE, "embedding_norm": True},
    "gpt_neox": {**GPT_LIKE, "tied": False},
    "phi": {**GPT_LIKE, "norms": 1, "tied": False, "head_bias": True},
    "palm": {**LLAMA, "norms": 1, "tied": True},
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "phi3": LLAMA,
    "olmo2": {**LLAMA, "qk_norm": "full"},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen2_moe": {**LLAMA, "qkv_bias": True, "shared_gate": True},
    "qwen3": {**LLAMA, "qk_norm": "head"},
    "qwen3_moe": {**LLAMA, "qk_norm": "head"},
    "gemma": {**LLAMA, "tied": True},
    "gemma2": {**LLAMA, "tied": True, "norms": 4},
    "gemma3_text": {**LLAMA, "tied": True, "norms": 4, "qk_norm": "head"},
    "deepseek_v2": LLAMA,
    "deepseek_v3": {**LLAMA, "router_bias": True},
}


def read(config: Mapping[str, Any], name: str = "") -> Model:
    """The model that a Hugging Face configuration describes.

    A `model_type` not known here is taken for a Llama, or for a GPT when it has no gated activation, and
    `Model.notes` says so.

    Raises:
        UserError: a number that every model has is missing.
    """
    if "text_config" in config and "hidden_size" not in config:  # a model of text and images
        config = {"model_type": f"{config.get('model_type')}_text", **config["text_config"]}
    kind = config.get("model_type", "")
    facts, notes = (FAMILIES[kind], ()) if kind in FAMILIES else _guess(config, kind)
    found = {field: _first(config, names) for field, names in NAMES.items()}
    for field in ("layers", "width", "heads", "vocab"):
        if not isinstance(found[field], int):
            known = ", ".join(NAMES[field])
            raise UserError(
                f"config.json: {field} is {found[field]!r}, expected a number under one of {known}"
            )
    context = found["context"] or 2048
    if kind == "falcon" and config.get("multi_query"):
        found["kv_heads"] = 1
    model = Model(
        name or config.get("_name_or_path") or kind,
        **{field: found[field] for field in ("layers", "width", "heads", "vocab")},
        context=context,
        ffn=found["ffn"] or 4 * found["width"],
        kv_heads=found["kv_heads"] or 0,
        head_dim=found["head_dim"] or 0,
        gated=facts["gated"],
        bias=facts["bias"],
        qkv_bias=facts.get("qkv_bias", False) or bool(config.get("attention_bias")),
        out_bias=bool(config.get("output_bias", config.get("attention_bias"))),
        ffn_bias=bool(config.get("mlp_bias")),
        norm=facts["norm"],
        norms=facts.get("norms", 2),
        positions=context + facts["positions"] if "positions" in facts else 0,
        tied=config.get("tie_word_embeddings", facts["tied"]),
        causal=facts.get("causal", True),
        final_norm=facts.get("final_norm", True),
        embedding_norm=facts.get("embedding_norm", False),
        qk_norm=_qk_norm(facts.get("qk_norm"), found),
        extra=_extra(config, facts, found["width"]),
        latent=_latent(config),
        experts=_experts(config, facts, found["layers"]),
        source=config.get("source", ""),
        notes=notes,
    )
    return model


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _guess(config: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    activation = str(_first(config, ("hidden_act", "activation_function", "hidden_activation")) or "silu")
    gated = "silu" in activation or "swiglu" in activation or "rms_norm_eps" in config
    taken = "Llama (gated feed-forward, RMSNorm)" if gated else "GPT (two matrices, LayerNorm, biases)"
    note = f"model_type {kind!r} is not known here and was taken for a {taken}; check the parameter count"
    return (LLAMA if gated else GPT_LIKE), (note,)


def _qk_norm(kind: str | None, found: Mapping[str, Any]) -> int:
    """Parameters of the norms on queries and keys: of one head each, or of all heads."""
    q = found["head_dim"] or found["width"] // found["heads"]
    if kind == "full":
        return q * (found["heads"] + (found["kv_heads"] or found["heads"]))
    return 2 * q if kind == "head" else 0


def _extra(config: Mapping[str, Any], facts: Mapping[str, Any], width: int) -> int:
    if config.get("model_type") == "bert":  # token types; the pooler's linear
        return config.get("type_vocab_size", 2) * width + width * width + width
    return config["vocab_size"] if facts.get("head_bias") else 0


def _latent(config: Mapping[str, Any]) -> Latent | None:
    if not config.get("kv_lora_rank"):
        return None
    keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Latent(*(config.get(key) or 0 for key in keys))


def _experts(config: Mapping[str, Any], facts: Mapping[str, Any], layers: int) -> Experts | None:
    count = _first(config, ("n_routed_experts", "num_local_experts", "num_experts"))
    if not count:
        return None
    width = _first(config, ("moe_intermediate_size", *NAMES["ffn"]))
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width
    dense = config.get("first_k_dense_replace") or len(config.get("mlp_only_layers") or ())
    step = config.get("moe_layer_freq") or config.get("decoder_sparse_step") or 1
    if step > 1:
        dense = layers - len([i for i in range(dense, layers) if (i + 1) % step == 0])
    active = _first(config, ("num_experts_per_tok", "num_experts_per_token", "moe_topk")) or 2
    gates = facts.get("shared_gate", False), facts.get("router_bias", False)
    return Experts(count, active, width, shared, dense, *gates)


def from_preset(name: str, config: GPTConfig | LlamaConfig) -> Model:
    """The model of one of our own configurations."""
    if isinstance(config, LlamaConfig):  # its fields are Hugging Face's
        kind = "qwen3" if config.qk_norm else "llama"
        source = "llmkern.models.LLAMA_PRESETS"
        return read({"model_type": kind, "source": source, **dataclasses.asdict(config)}, name)
    return Model(
        name, config.n_layer, config.n_embd, config.n_head, 4 * config.n_embd, config.vocab_size,
        config.block_size, bias=config.bias, norm=1 + config.bias, positions=config.block_size,
        source="llmkern.models.PRESETS",
    )  # fmt: skip


@cache
def published() -> dict[str, Model]:
    """Name -> model: our presets, and the published configurations of `models.json`."""
    configs = json.loads(Path(__file__).with_name("models.json").read_text())
    named = {name: read({**config, "_name_or_path": name}) for name, config in configs.items()}
    ours = {**PRESETS, **LLAMA_PRESETS}
    return {**{name: from_preset(name, config) for name, config in ours.items()}, **named}


def find(model: str | Path | Mapping[str, Any] | GPTConfig | LlamaConfig | Model) -> Model:
    """The model that a user means: a name, a config.json or its folder, its content, or our own config.

    Raises:
        UserError: no such name or file, with the nearest names; or an unreadable file.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, (GPTConfig, LlamaConfig)):
        return from_preset(type(model).__name__, model)
    if isinstance(model, Mapping):
        return read(model)
    known = published()
    key = str(model).strip().lower().replace("_", "-").replace(" ", "-")
    if key in known:
        return known[key]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return _read_file(path)
    near = get_close_matches(key, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise UserError(f"model is {str(model)!r}, neither a file (config.json) nor a known name; {hint}")


def _read_file(path: Path) -> Model:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, expected the object of a config.json")
    return read(config, name=path.resolve().parent.name if path.name == "config.json" else path.stem)
