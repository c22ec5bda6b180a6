"""Activations of the feed-forward layer and their derivatives, for use inside kernels.

gelu: Hendrycks, Gimpel 2016, arXiv:1606.08415, sec. 2.  Its tanh form is written with the logistic
function, (1 + tanh z) / 2 = sigmoid(2 z), which loses no digits where tanh is near -1.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def tanh(x):
    """Near 0, where 1 - 2 / (e^2x + 1) loses digits, an odd polynomial (Moshier 1992, Cephes)."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _relu(u):
    return tl.where(u < 0.0, 0.0, u)  # NaN stays NaN, which a maximum would drop


@triton.jit
def _gelu_tanh_gate(u):
    return _sigmoid((u + u * u * u * _CUBE) * _TWO_SQRT_2_OVER_PI)


@triton.jit
def activate(u, F: tl.constexpr):
    """f(u)."""
    if F == "relu":
        return _relu(u)
    elif F == "relu2":
        return _relu(u) * _relu(u)
    elif F == "silu":
        return u * _sigmoid(u)
    elif F == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))
    else:
        return u * _gelu_tanh_gate(u)


@triton.jit
def derivative(u, F: tl.constexpr):
    """f'(u)."""
    if F == "relu":
        return tl.where(u > 0.0, 1.0, 0.0)
    elif F == "relu2":
        return 2.0 * _relu(u)
    elif F == "silu":
        s = _sigmoid(u)
        return s * (1.0 + u * (1.0 - s))
    elif F == "gelu":
        density = tl.exp(-0.5 * u * u) * _INV_SQRT_2PI
        return 0.5 * (1.0 + tl.erf(u * _SQRT_HALF)) + u * density
    else:
        s = _gelu_tanh_gate(u)
        return s + u * s * (1.0 - s) * (1.0 + u * u * 3.0 * _CUBE) * _TWO_SQRT_2_OVER_PI
