"""Who a GPU run measures llmkern against: torch's several ways, and other libraries where they are.

A peer is a function of an op's arguments, those of `Op.public`; `functions` gives it, or why there is none.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops.op import Op

Function = Callable[..., Tensor | tuple]
LIBRARIES = {
    "liger": "liger_kernel", "quack": "quack", "flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute",
}  # fmt: skip
NAMES = ("eager", "max-autotune", "sdpa-flash", "sdpa-cudnn", "flex", *LIBRARIES)


def functions(op: Op, device: str) -> dict[str, Function | str]:
    """Every peer that is one of this op, or the sentence that says why it is not here."""
    found: dict[str, Function | str] = {"eager": op.eager}
    compiled = torch.compile(op.eager, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    found["max-autotune"] = compiled if device == "cuda" else "tunes GPUs"
    if op.name == "attention":
        for name, backend in (("sdpa-flash", "FLASH_ATTENTION"), ("sdpa-cudnn", "CUDNN_ATTENTION")):
            found[name] = partial(_sdpa, backend) if device == "cuda" else "is for GPUs"
        found["flex"] = _flex if device == "cuda" else "is for GPUs"
    for name, module in LIBRARIES.items():
        make = MAKERS.get((name, op.name))
        if make is None:
            continue
        if device != "cuda":
            found[name] = "is for GPUs"
        else:
            found[name] = make if importable(module) else f"`import {module}` fails here"
    return found


def importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend[backend]):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )


_flex_masks: dict[tuple, object] = {}


def _flex(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key = (q.shape[2], k.shape[2], is_causal)
    if key not in _flex_masks:
        causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], q.device)
        _flex_masks[key] = torch.compile(flex_attention, dynamic=False), causal if is_causal else None
    run, mask = _flex_masks[key]
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=is_causal)


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=is_causal)[0]


def _liger_rms_norm(x: Tensor, shape: tuple, weight: Tensor, eps: float = 1e-6) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, in_place=False)


def _liger_layer_norm(x: Tensor, shape: tuple, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, eps)


def _liger_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits.clone(), target)  # it overwrites its input


def _liger_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple:
    from liger_kernel.transformers.functional import liger_rope

    wide = [torch.cat((t, t), -1)[None].to(q.dtype) for t in (cos, sin)]
    return liger_rope(q.clone(), k.clone(), *wide)  # it overwrites its inputs


def _quack_rms_norm(x: Tensor, shape: tuple, weight: Tensor, eps: float = 1e-6) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(x, weight, eps=eps)


def _quack_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from quack import cross_entropy

    return cross_entropy(logits, target, reduction="mean")


MAKERS: dict[tuple[str, str], Function] = {
    ("flash-attn", "attention"): _flash_attention,
    ("flash-attn-4", "attention"): _flash_attention_4,
    ("liger", "rms_norm"): _liger_rms_norm,
    ("liger", "layer_norm"): _liger_layer_norm,
    ("liger", "cross_entropy"): _liger_cross_entropy,
    ("liger", "linear_cross_entropy"): _liger_linear_cross_entropy,
    ("liger", "rope"): _liger_rope,
    ("quack", "rms_norm"): _quack_rms_norm,
    ("quack", "cross_entropy"): _quack_cross_entropy,
}
