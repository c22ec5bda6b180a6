"""`scaled_dot_product_attention` itself, for the whole process: enable_sdpa, disable_sdpa.

torch's operator gets another kernel under the dispatch keys of CPUs and GPUs, with and without autograd;
so every caller is served, `torch.nn` and `torch.compile` among them.
"""

import torch
from torch import Tensor

from ..nn.functional import attend

KEYS = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA")
_library: torch.library.Library | None = None


class Sdpa:
    """What `enable_sdpa` returns: `with enable_sdpa(): ...` ends with `disable_sdpa()`, unless it was on."""

    def __init__(self, was_on: bool) -> None:
        self.was_on = was_on

    def __enter__(self) -> "Sdpa":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.was_on:
            disable_sdpa()


def enable_sdpa() -> Sdpa:
    """Have llmkern compute `torch.nn.functional.scaled_dot_product_attention`, for the whole process.

    What its kernel does not take, torch computes, and it is told why, once.  Not reached are the fast paths
    of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in evaluation, which call another operator:
    `swap_` swaps these, or `torch.backends.mha.set_fastpath_enabled(False)` turns them off.

    Returns:
        To be ignored, or used in a `with` statement, after which torch's own is back.
    """
    global _library
    was_on = _library is not None
    if not was_on:
        _library = torch.library.Library("aten", "IMPL")
        for key in KEYS:
            _library.impl("scaled_dot_product_attention", _kernel, key)
    return Sdpa(was_on)


def disable_sdpa() -> None:
    """Give `scaled_dot_product_attention` back to torch."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _own(*args: object, **kwargs: object) -> Tensor:
    """torch's kernel, which stays registered behind ours."""
    op = torch.ops.aten.scaled_dot_product_attention.default
    return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return attend(_own, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
