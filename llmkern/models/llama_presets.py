"""Published shapes of the Llama family by name, each from the config.json of its release."""

from typing import Any

from .llama import LlamaConfig


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int,
    theta: float = 10000.0, eps: float = 1e-5, **more: Any,
) -> LlamaConfig:  # fmt: skip
    return LlamaConfig(
        vocab, hidden, intermediate, layers, heads, kv_heads, max_position_embeddings=context,
        rope_theta=theta, rms_norm_eps=eps, **more,
    )  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
QWEN2 = {"eps": 1e-6, "attention_bias": True, **TIED}
QWEN3 = {"eps": 1e-6, "qk_norm": True, "head_dim": 128, **TIED}

LLAMA_PRESETS = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072, 5e5, rope_scaling=LLAMA3, **TIED),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072, 5e5, rope_scaling=LLAMA3, **TIED),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, 32768, 1e6, **QWEN2),
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, 131072, 1e6, **QWEN2),
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, 151936, 40960, 1e6, **QWEN3),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, 1e5, **TIED),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, 8192, 1e5, **TIED),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, 1.3e5, **TIED),
}
