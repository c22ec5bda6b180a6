"""Starts the attention kernels that are written for one GPU, and says when they cannot run.

They have been compiled, their machine code read, and their source run over a model of the GPU
(`tests/gluon_model.py`), but none has run on a device: until one is listed in `config.PROVEN`, it runs only
under LLMKERN_GLUON=1.
"""

import os
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import config, tiles
from .attention_scores import LOG2E, Rules
from .launch import architecture, fit, launch, multiprocessors
from .tma import heads_fit, strides

OLDEST = (3, 9)  # Triton whose Gluon has the names that are used here


def why_not_gluon(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> str | None:
    """Why the forward kernel for sm_90 cannot take these arguments; None if it can."""
    if architecture(q) != "sm_90":
        return "the GPU is no sm_90"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, this is {triton.__version__}"
    if "attention_fwd" not in config.PROVEN and os.environ.get("LLMKERN_GLUON") != "1":
        return "it has not been proven on a device yet; LLMKERN_GLUON=1 switches it on"
    if q.element_size() != 2:
        return f"it is for 16 bits, query is {q.dtype}"
    optional = ("mask", "alibi_slopes", "sinks", "spans", "seed")
    given = [name for name in optional if getattr(rules, name) is not None]
    given += ["softcap"] if rules.softcap else []
    given += ["window"] if rules.left is not None or rules.right not in (None, 0) else []
    if given:
        return f"it has no {', '.join(given)}"
    if rules.scale <= 0:
        return f"it takes a positive scale, not {rules.scale}"
    if max(q.shape[3], v.shape[3]) > 128 or not k.shape[2]:
        return "it takes head dims up to 128, and at least one key"
    for name, t in (("query", q), ("key", k), ("value", v)):
        if not heads_fit(t):
            return f"{name} has strides {t.stride()} or an address that are no multiples of 16 bytes"
    return None


def attention_fwd_gluon(q: Tensor, k: Tensor, v: Tensor, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """As attention_fwd, where why_not_gluon is None."""
    from .attention_hopper import hopper_forward_kernel

    batch, heads, s_q, _ = q.shape
    tile = tiles.find("attention_fwd_gluon", q, fit(max(q.shape[3], v.shape[3]), 64, 128))
    blocks = triton.cdiv(s_q, tile.rows)
    causal = rules.right is not None
    launch(
        hopper_forward_kernel, q, (min(multiprocessors(q), batch * heads * blocks),),
        descriptor(q, tile.rows // 2), descriptor(k, tile.cols), descriptor(v, tile.cols),
        descriptor(out, tile.rows // 2), lse, batch, heads, heads // k.shape[1], s_q, k.shape[2],
        rules.diagonal, heads_together(q, k, v), rules.scale * LOG2E, causal, tile.stages,
        warps=tile.warps,
    )  # fmt: skip


def heads_together(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Heads of queries whose keys and values fit the part of the L2 cache that is for them."""
    one = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    group = q.shape[1] // k.shape[1]
    return min(q.shape[0] * q.shape[1], max(1, config.HOPPER_L2 // one) * group)


def descriptor(x: Tensor, rows: int) -> Any:
    """A TMA descriptor of x (B, H, S, D) with boxes of so many rows of one head, all of D."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = (1, 1, rows, fit(x.shape[3], 64, 128))
    return TensorDescriptor(x, list(x.shape), strides(x), list(box), shared_layout(box, x.dtype))


@cache
def shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Of a box in shared memory; kept, since to find it takes longer than all else of a descriptor."""
    from triton.experimental.gluon import language as gl

    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(list(box), element)
