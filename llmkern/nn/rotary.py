"""Somebody's function that rotates queries and keys by tables of each token, on llmkern's kernel."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops


def rotates(f: Any) -> str | None:
    """ "halves" or "interleaved", how `f(q, k, cos, sin)` pairs the elements of a head; None if it does not.

    Proved by running it.
    """
    try:
        names = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return None
    if names[:4] != ["q", "k", "cos", "sin"]:
        return None
    return _proved(f)


@cache
def _proved(f: Callable[..., Any]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 4)
    q, k, angles = (torch.randn(shape, generator=generator) for shape in shapes)
    for how in ("halves", "interleaved"):
        table = torch.cat((angles, angles), -1) if how == "halves" else angles.repeat_interleave(2, -1)
        cos, sin = table.cos(), table.sin()
        try:
            theirs = f(q.clone(), k.clone(), cos, sin)
            with ops.use("reference"):
                ours = _rotate(q, k, cos, sin, how == "interleaved")
            if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours)):
                return how
        except Exception:  # whatever it is, it is not this
            continue
    return None


def laid_out(tables: Any, how: str) -> bool:
    """Whether a pair (cos, sin), each (B, T, D), holds each angle for both elements of its pair."""
    if not (isinstance(tables, tuple) and len(tables) == 2 and all(t.dim() == 3 for t in tables)):
        return False
    for t in tables:
        pairs = t.unflatten(-1, (-1, 2) if how == "interleaved" else (2, -1))
        axis = -1 if how == "interleaved" else -2
        if not torch.equal(pairs.select(axis, 0), pairs.select(axis, 1)):
            return False
    return True


@cache
def rotation(f: Callable[..., Any], interleaved: bool) -> Callable[..., Any]:
    """What to call in place of f; what is not a plain rotation, f computes."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and kwargs.get("unsqueeze_dim", 1) == 1 and not set(kwargs) - {"unsqueeze_dim"}
        if not plain or not q.dim() == k.dim() == 4 or cos.dim() != 3 or q.dtype != k.dtype:
            return f(q, k, cos, sin, *args, **kwargs)
        return _rotate(q, k, cos, sin, interleaved)

    return rotate


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin are (B or 1, T, D), each angle in them twice."""
    batch, length, dim = cos.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pairs = slice(0, None, 2) if interleaved else slice(0, dim // 2)
    cos, sin = (t[..., pairs].reshape(batch * length, dim // 2).to(dtype) for t in (cos, sin))
    positions = None  # the rows of the tables in their order
    if batch > 1:
        positions = torch.arange(batch * length, device=q.device).view(batch, length)
    return ops.rope(q, k, cos, sin, interleaved=interleaved, position_ids=positions)
