"""Frequencies and tables of rotary position embeddings, with the scalings of Hugging Face's configs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(
    dim: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, float]:
    """The angle by which each pair of elements turns from one position to the next.

    Args:
        dim: how many elements of a head are rotated; even.
        base: theta, so that pair i turns by base^(-2i/dim) radians.
        scaling: as `rope_scaling` (or `rope_parameters`) of a Hugging Face config: None, or a dict whose
            "rope_type" (or "type") is "default", "linear", "dynamic", "yarn" or "llama3"; or "factors",
            whose "factors", one a pair, divide the frequencies, as `rope_freqs` of a GGUF file does.
        max_position_embeddings: the context the model was made for; needed by "dynamic", and by "yarn"
            and "llama3" if `scaling` has no "original_max_position_embeddings".
        seq_len: the current length in tokens, for "dynamic"; up to max_position_embeddings it scales nothing.

    Returns:
        Inverse frequencies, (dim / 2,) float64 on the CPU, and the attention factor, by which cosine and
        sine are multiplied (1.0 but for "yarn").

    Raises:
        ValueError: an odd `dim`, an unknown type, a missing key.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864, sec. 3.2.2; Chen et al. 2023, Position
    Interpolation, arXiv:2306.15595 (linear); Peng et al. 2023, YaRN, arXiv:2309.00071 (dynamic: app. B,
    yarn: sec. 3); Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv:2407.21783 (llama3).
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_frequencies: dim is {dim}, expected an even number of at least 2")
    scaling = dict(scaling or {})
    if max_position_embeddings is not None:
        scaling.setdefault("max_position_embeddings", max_position_embeddings)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(
            f"rope_frequencies: the rope_type of scaling is {kind!r}, expected one of {', '.join(_SCALINGS)}"
        )
    return _SCALINGS[kind](dim, base, scaling, seq_len)


def rope_table(
    positions: int,
    dim: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, for the positions 0 to positions - 1.

    Args:
        positions: how many; with "dynamic" scaling it is the sequence length, too.
        dim, base, scaling, max_position_embeddings: as in `rope_frequencies`.

    Returns:
        cos, sin: (positions, dim / 2) float32 on `device`, times the attention factor; computed in
        float64 and rounded once.
    """
    frequencies, factor = rope_frequencies(
        dim, base, scaling, max_position_embeddings=max_position_embeddings, seq_len=positions
    )
    angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return tuple((f() * factor).to(device or "cpu", torch.float32) for f in (angles.cos, angles.sin))


def _default(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim), 1.0


def _linear(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    return _default(dim, base, scaling, seq_len)[0] / _need(scaling, "factor"), 1.0


def _dynamic(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    """A larger base, so that the slowest pair turns as far over seq_len as it did over the old context."""
    factor, context = _need(scaling, "factor"), _need(scaling, "max_position_embeddings")
    stretch = factor * max(seq_len or 0, context) / context - (factor - 1)
    base *= stretch ** (dim / (dim - 2)) if dim > 2 else 1.0
    return _default(dim, base, scaling, seq_len)


def _yarn(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    """Pairs that turn often are left alone, slow ones slowed by `factor`, a ramp between them."""
    context = _original_context(scaling)
    factor = scaling.get("factor") or _need(scaling, "max_position_embeddings") / context

    def pair_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / ((high - low) or 0.001)
    frequencies = _default(dim, base, scaling, seq_len)[0]
    return frequencies * (1 - ramp.clamp(0, 1) * (1 - 1 / factor)), _yarn_attention(factor, scaling)


def _yarn_attention(factor: float, scaling: dict) -> float:
    """YaRN, eq. 22, where the scores are multiplied by its square; DeepSeek's configs set the mscales."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature(1.0)


def _llama3(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    """As YaRN, with a ramp over how often a pair turns in the old context."""
    context, factor = _original_context(scaling), _need(scaling, "factor")
    low, high = _need(scaling, "low_freq_factor"), _need(scaling, "high_freq_factor")
    frequencies = _default(dim, base, scaling, seq_len)[0]
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def _factors(dim: int, base: float, scaling: dict, seq_len: int | None) -> tuple[Tensor, float]:
    factors = torch.tensor(_need(scaling, "factors"), dtype=torch.float64, device="cpu")
    if factors.shape != (dim // 2,):
        raise ValueError(
            f"rope_frequencies: scaling has {factors.numel()} factors, expected {dim // 2}, one a pair"
        )
    return _default(dim, base, scaling, seq_len)[0] / factors, 1.0


def _original_context(scaling: dict) -> float:
    return scaling.get("original_max_position_embeddings") or _need(scaling, "max_position_embeddings")


def _need(scaling: dict, key: str) -> float:
    if scaling.get(key) is None:
        raise ValueError(f"rope_frequencies: scaling has no {key!r}, which its rope_type needs")
    return scaling[key]


_SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "factors": _factors,
}
