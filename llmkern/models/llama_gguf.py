"""From a GGUF file to a Llama: names, options, and the order that llama.cpp gave the rows of q and k."""

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantLinear, RotaryEmbedding
from ..ops.quant_weight import QuantWeight, depth, dequantize
from .gguf import GGUF, GGUFError
from .llama import Llama, LlamaConfig
from .meta import on_meta

# architectures -> whether llama.cpp's converter interleaved the halves of each head in q and k
ARCHITECTURES = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = "rope_freqs.weight"


def load_gguf(
    file: GGUF | str | PathLike, dtype: torch.dtype = torch.float32, quantized: bool = True
) -> Llama:
    """A Llama, Mistral, Qwen 2 or Qwen 3 with the weights of a GGUF file.

    Args:
        file: a GGUF, or the path of one.
        dtype: of embeddings, norms, biases and dense linears.
        quantized: linears that the file has in 8 or 4 bits become `llmkern.nn.QuantLinear`s with the file's
            own codes; False decodes them to `dtype`.  The embedding is always decoded.

    Returns:
        The model, in evaluation mode.

    Raises:
        GGUFError: another architecture, or tensors that are missing, unknown or of the wrong shape.
    """
    file = file if isinstance(file, GGUF) else GGUF(file)
    config = gguf_config(file)
    if config.num_hidden_layers > len(file.tensors):
        raise GGUFError(
            f"load_gguf: {config.num_hidden_layers} layers are described with {len(file.tensors)} tensors"
        )
    model = on_meta(Llama, config, "the metadata of the GGUF file")
    c, turned = config, ARCHITECTURES[file.metadata["general.architecture"]]
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name in file.tensors:
        if name == FACTORS:
            continue
        path, kind = _our_name(name)
        weight = file.tensor(name)
        if turned and path.endswith(("q_proj", "k_proj")):
            weight = _unturned(weight, heads[path[-6:]])
        _set(model, path, kind, weight, dtype, quantized, name)
    if c.tie_word_embeddings:
        _tie(model, file.tensor("token_embd.weight"), quantized)
    model.rotary = RotaryEmbedding(
        c.head_dim, c.max_position_embeddings, c.rope_theta, scaling=c.rope_scaling
    )
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise GGUFError(f"load_gguf: the file has no tensor for {', '.join(missing)}")
    return model.eval()


def gguf_config(file: GGUF) -> LlamaConfig:
    """The shape of the model in a GGUF file, from its metadata and the shape of its embedding."""
    m = file.metadata
    arch = m.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise GGUFError(
            f"load_gguf: general.architecture is {arch!r}, expected one of {', '.join(ARCHITECTURES)}"
        )

    def need(key: str, kind: type = int, default: Any = None) -> Any:
        value = m.get(f"{arch}.{key}", default)
        if value is None:
            raise GGUFError(f"load_gguf: the file has no {arch}.{key}")
        if not isinstance(value, kind) or not value > 0:
            raise GGUFError(f"load_gguf: {arch}.{key} is {value!r}, expected a positive {kind.__name__}")
        return value

    if "token_embd.weight" not in file.tensors:
        raise GGUFError("load_gguf: the file has no tensor token_embd.weight")
    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = need("attention.key_length", default=width // heads or None)
    rotary = need("rope.dimension_count", default=head_dim)
    if rotary != head_dim:
        raise GGUFError(
            f"load_gguf: {arch}.rope.dimension_count is {rotary}, expected {head_dim}, all of a head"
        )
    if m.get(f"{arch}.expert_count"):
        raise GGUFError("load_gguf: the file is a mixture of experts, expected one MLP a layer")
    return LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=need("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon", float),
        rope_theta=need("rope.freq_base", float, 10000.0),
        rope_scaling=_scaling(file, arch),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=m.get(f"{arch}.attention.sliding_window") or None,
    )


def _scaling(file: GGUF, arch: str) -> dict[str, Any] | None:
    if FACTORS in file.tensors:
        return {"rope_type": "factors", "factors": file.tensor(FACTORS).tolist()}
    m = file.metadata
    kind = m.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": m.get(f"{arch}.rope.scaling.factor")}
    original = m.get(f"{arch}.rope.scaling.original_context_length")
    return {**scaling, "original_max_position_embeddings": original} if original else scaling


def _our_name(name: str) -> tuple[str, str]:
    """blk.3.attn_q.weight to (model.layers.3.self_attn.q_proj, weight)."""
    stem, _, kind = name.rpartition(".")
    block, number, part = "", "", stem
    if stem.startswith("blk."):
        block, number, part = [*stem.split(".", 2), "", ""][:3]
    if part not in NAMES or kind not in ("weight", "bias"):
        raise GGUFError(f"load_gguf: the file has a tensor {name!r}, which no layer of a Llama has")
    return (f"model.layers.{number}.{NAMES[part]}" if block else NAMES[part]), kind


def _unturned(weight: Tensor | QuantWeight, heads: int) -> Tensor | QuantWeight:
    """Rows of each head in the order of Hugging Face: llama.cpp has row i beside row i + D / 2."""
    parts = weight if isinstance(weight, QuantWeight) else (weight,)
    parts = [
        None if p is None else p.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) for p in parts
    ]
    return QuantWeight(*parts) if isinstance(weight, QuantWeight) else parts[0]


def _set(
    model: Llama, path: str, kind: str, weight: Tensor | QuantWeight, dtype: torch.dtype, quantized: bool,
    name: str,
) -> None:  # fmt: skip
    """Put a tensor of the file where the model has it."""
    try:
        module = model.get_submodule(path)
        expected = tuple(getattr(module, kind).shape)
    except AttributeError:
        raise GGUFError(f"load_gguf: the file has a tensor {name!r}, which the model has not") from None
    if isinstance(weight, QuantWeight) and not (quantized and isinstance(module, nn.Linear)):
        weight = dequantize(*weight, dtype)
    coded = isinstance(weight, QuantWeight)
    shape = (len(weight.qweight), depth(weight.qweight)) if coded else tuple(weight.shape)
    if shape != expected:
        raise GGUFError(f"load_gguf: tensor {name!r} has shape {shape}, expected {expected}")
    if coded:
        model.set_submodule(path, QuantLinear(weight, module.bias))
    else:
        setattr(module, kind, nn.Parameter(weight.to(dtype, copy=True)))


def _tie(model: Llama, embedding: Tensor | QuantWeight, quantized: bool) -> None:
    """The head of a model that has the embedding's weight there, too."""
    if quantized and isinstance(embedding, QuantWeight):
        model.lm_head = QuantLinear(embedding)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
