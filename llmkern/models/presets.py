"""Published GPT-2 and GPT-3 shapes by name, and two small ones; `preset` also knows the Llama family's.

GPT-2: Radford et al. 2019, table 2, as released.  GPT-3: Brown et al. 2020, arXiv:2005.14165, table 2.1,
with all layers dense.  Two entries of that table do not multiply out: 13B prints d_model 5140, where 40
heads of 128 are 5120; XL prints 24 heads of 128 for d_model 2048, which holds 16.
"""

import dataclasses

from .gpt import GPTConfig
from .llama import LlamaConfig
from .llama_presets import LLAMA_PRESETS


def _gpt(n_layer: int, n_embd: int, n_head: int, block_size: int, vocab_size: int = 50257) -> GPTConfig:
    return GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)


PRESETS = {
    "nano": _gpt(4, 128, 4, block_size=64, vocab_size=65),
    "shakespeare-char": _gpt(6, 384, 6, block_size=256, vocab_size=65),
    "gpt2": _gpt(12, 768, 12, block_size=1024),
    "gpt2-medium": _gpt(24, 1024, 16, block_size=1024),
    "gpt2-large": _gpt(36, 1280, 20, block_size=1024),
    "gpt2-xl": _gpt(48, 1600, 25, block_size=1024),
    "gpt3-small": _gpt(12, 768, 12, block_size=2048),
    "gpt3-medium": _gpt(24, 1024, 16, block_size=2048),
    "gpt3-large": _gpt(24, 1536, 16, block_size=2048),
    "gpt3-xl": _gpt(24, 2048, 16, block_size=2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, block_size=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, block_size=2048),
    "gpt3-13b": _gpt(40, 5120, 40, block_size=2048),
    "gpt3-175b": _gpt(96, 12288, 96, block_size=2048),
}


def preset(name: str, **changes: object) -> GPTConfig | LlamaConfig:
    """The configuration called `name`, with some fields changed.

    Examples: `GPT(preset("gpt2", dropout=0.1))`, `Llama(preset("smollm2-135m"))`.

    Raises:
        ValueError: an unknown name.
    """
    known = {**PRESETS, **LLAMA_PRESETS}
    if name not in known:
        raise ValueError(f"preset: name is {name!r}, expected one of {', '.join(known)}")
    return dataclasses.replace(known[name], **changes)
