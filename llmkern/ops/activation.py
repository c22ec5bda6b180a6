"""Activations of the feed-forward layer and their derivatives, by their formulas."""

import math

from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}  # Shazeer 2020


def activate(u: Tensor, f: str) -> Tensor:
    """f(u), by its formula; gelu: Hendrycks, Gimpel 2016, arXiv:1606.08415, sec. 2."""
    if f == "relu":
        return u.relu()
    if f == "relu2":
        return u.relu().square()
    if f == "silu":
        return u * u.sigmoid()
    if f == "gelu":
        return 0.5 * u * (1 + (u / math.sqrt(2)).erf())
    return 0.5 * u * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())


def derivative(u: Tensor, f: str) -> Tensor:
    """f'(u)."""
    if f == "relu":
        return (u > 0).to(u.dtype)
    if f == "relu2":
        return 2 * u.relu()
    if f == "silu":
        s = u.sigmoid()
        return s * (1 + u * (1 - s))
    if f == "gelu":
        return 0.5 * (1 + (u / math.sqrt(2)).erf()) + u * (-0.5 * u * u).exp() / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = (c * (u + 0.044715 * u**3)).tanh()
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * 0.044715 * u * u)
