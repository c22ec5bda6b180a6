"""GGUF files put together by the letter of the specification."""

import struct
from pathlib import Path

import torch

from llmkern.models import Llama, LlamaConfig
from llmkern.models.llama_gguf import NAMES


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(entries=(), tensors=(), data=b"", version=3, magic=b"GGUF", alignment=32, counts=None) -> bytes:
    n, m = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, n, m) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


INT, FLOAT, TEXT = 4, 6, 8


def metadata(config: LlamaConfig, arch: str, **more: object) -> list[bytes]:
    values = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta, **more,
    }  # fmt: skip
    entries = [entry("general.architecture", TEXT, string(arch))]
    for key, value in values.items():
        kind, code = (INT, "<I") if isinstance(value, int) else (FLOAT, "<f")
        data = string(value) if isinstance(value, str) else struct.pack(code, value)
        entries.append(entry(f"{arch}.{key}", TEXT if isinstance(value, str) else kind, data))
    return entries


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows that llama.cpp's convert_hf_to_gguf.py gives q and k of a Llama."""
    shape = heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def q8_0(weight: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """Blocks of Q8_0 and what they stand for."""
    w = weight.unflatten(1, (-1, 32))
    d = (w.abs().amax(-1, keepdim=True) / 127).half()
    q = (w / d.float()).round().clamp(-127, 127).to(torch.int8)
    blocks = torch.cat((d.view(torch.int8), q), dim=-1)
    return blocks.numpy().tobytes(), (q * d.float()).flatten(1)


def write_llama(
    path: Path, model: Llama, arch: str = "llama", coded: str = "", drop: str = "", **more
) -> None:
    """The model as GGUF; linears whose name contains `coded` as Q8_0, which also rounds them in the model."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    infos, data = [], b""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, p in model.named_parameters():
        path_, _, kind = name.rpartition(".")
        layer, part = path_.split(".", 3)[2:] if "layers" in path_ else ("", path_)
        theirs = ours[part]
        tensor = p.detach()
        if coded and coded in name:
            p.data = q8_0(tensor)[1]
        if arch == "llama" and theirs in heads:
            tensor = turned(tensor, heads[theirs])
        full = f"blk.{layer}.{theirs}.{kind}" if layer else f"{theirs}.{kind}"
        if drop and drop in full:
            continue
        raw = q8_0(tensor)[0] if coded and coded in name else tensor.contiguous().numpy().tobytes()
        infos.append(info(full, tuple(tensor.shape[::-1]), 8 if coded and coded in name else 0, len(data)))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(build(metadata(model.config, arch, **more), infos, data))
