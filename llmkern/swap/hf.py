"""Attention of Hugging Face models, through transformers' own registry of attention functions.

`swap_` calls `model.set_attn_implementation("llmkern")`: a setting of that model alone.
"""

import sys
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from ..report import Change, Entry

NAME = "llmkern"
BEFORE = "_llmkern_attention_before"  # the attribute in which a model keeps its former setting
UNKNOWN = ("position_bias", "head_mask")  # what the kernel cannot do yet


def plan(models: list[tuple[str, nn.Module]]) -> Iterator[Change]:
    """Set the outermost Hugging Face models to llmkern's attention; each sets its parts."""
    inside: set[nn.Module] = set()
    for path, module in models:
        if not is_model(module) or module in inside:
            continue
        inside.update(module.modules())
        was = implementation(module)
        if was != NAME and _takes_a_setting(module):
            entry = Entry(path, f"attention {was!r}", f"attention {NAME!r}")
            yield Change(entry, lambda module=module: _use_kernels(module))


def undo(path: str, module: nn.Module) -> Iterator[Change]:
    """Set the model to the attention that it had before."""
    if hasattr(module, BEFORE):
        entry = Entry(path, f"attention {NAME!r}", f"attention {getattr(module, BEFORE)!r}")
        yield Change(entry, lambda: _restore(module))


def is_model(module: nn.Module) -> bool:
    """Whether it is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def implementation(model: nn.Module) -> str:
    """The attention that the model is set to: "sdpa", "eager", "llmkern" ..."""
    return model.config._attn_implementation


def _takes_a_setting(model: nn.Module) -> bool:
    """Whether its attention goes through transformers' registry; older models compute their own."""
    return getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)


def _use_kernels(model: nn.Module) -> None:
    _register()
    setattr(model, BEFORE, implementation(model))
    model.set_attn_implementation(NAME)


def _restore(model: nn.Module) -> None:
    model.set_attn_implementation(getattr(model, BEFORE))
    delattr(model, BEFORE)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What a transformers attention module calls.

    Args:
        query, key, value: (B, H, S_q, D), (B, H_kv, S_k, D), (B, H_kv, S_k, D).
        attention_mask: broadcastable to (B, H, S_q, S_k), bool or additive; None is causal or full, as
            `is_causal`, or by default the module, says.  A sliding window is in it.
        softcap: of the scores, as Gemma 2 has it.
        s_aux: (H,), sinks, as gpt-oss has them.

    Returns:
        (output, None): (B, S_q, H, D); weights are never formed.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if reason := _why_not(kwargs):
        fall_back(f"{type(module).__name__}'s attention", reason)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = _additive(attention_mask, causal, query, key)
        options = dict(softcap=softcap, s_aux=s_aux)
        kwargs.update({name: value for name, value in options.items() if value is not None})
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    out = ops.attention(
        query, key, value, attention_mask, dropout, causal, scaling, softcap=softcap or 0.0, sinks=s_aux
    )
    return out.transpose(1, 2), None


def _additive(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as transformers' eager attention adds it."""
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _why_not(kwargs: dict) -> str | None:
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            return f"its option {name} is {type(kwargs[name]).__name__}, expected None"
    return None
