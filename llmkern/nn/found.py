"""Kernels for norms and feed-forward layers in somebody's code, found by structure and proved by running.

No list of names: a module is taken for an RMSNorm, or for a feed-forward layer, when its parameters
have the shapes of one, and then only if on random input it returns what the op returns.  `swap_` gives
it a class made for it here, a subclass of its own that overrides forward.
"""

import inspect
import sys
from collections.abc import Iterator
from functools import cache, partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from ..ops.ffn import ACTIVATIONS, activate
from .children import hooked, unfused
from .linear import Linear

ROLES = "_llmkern_roles"  # the attribute in which a swapped module keeps what was found out about it


class Found(NamedTuple):
    """What a module is: the class to mix in, and what that needs to know."""

    mixin: type
    roles: dict[str, Any]


class RMSNormKernel:
    """x / sqrt(mean(x²) + eps) times weight, or for Gemma times 1 + weight, on llmkern's kernel."""

    kind = "norm"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.weight.dtype != x.dtype:
            fall_back(type(self).__qualname__, f"x is {x.dtype} and the weight {self.weight.dtype}")
            return super().forward(x, *args, **kwargs)
        return _run_norm(self, x, **getattr(self, ROLES))


class FFNKernel:
    """Linear, activation, linear, or with a gate, as one fused op."""

    kind = "ffn"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reason := _why_not_fused(self, args or kwargs):
            unfused(type(self).__qualname__, reason, *self.children())
            return super().forward(x, *args, **kwargs)
        return _run_ffn(self, x, **getattr(self, ROLES))


def recognise(module: nn.Module) -> Found | None:
    """What the module is, if it is one of these and its parameters are there to be tried."""
    parameters = list(module.parameters())
    if not parameters or any(not p.is_floating_point() or p.is_meta for p in parameters):
        return None
    if not _takes_one_tensor(module):
        return None
    for found in (*_norm_candidates(module, parameters), *_ffn_candidates(module)):
        if _proved(module, found):
            return found
    return None


@cache
def kernel_class(mixin: type, cls: type) -> type:
    """The subclass of `cls` that runs `mixin`'s forward; pickle finds it again through `__getattr__`."""
    name = f"{mixin.__name__} of {cls.__module__} {cls.__qualname__}".replace(".", "/")
    return type(name, (mixin, cls), {"__module__": __name__, "__doc__": mixin.__doc__})


def __getattr__(name: str) -> type:
    mixin, of, path = name.partition(" of ")
    if not of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, qualname = path.replace("/", ".").rpartition(" ")
    cls: Any = sys.modules.get(module) or __import__(module, fromlist=["_"])
    for part in qualname.split("."):
        cls = getattr(cls, part)
    return kernel_class(globals()[mixin], cls)


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind in (0, 1)]
    return len(required) == 1 and all(
        p.kind != p.KEYWORD_ONLY or p.default is not p.empty for p in parameters
    )


def _norm_candidates(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Found]:
    weight = getattr(module, "weight", None)
    if len(parameters) != 1 or weight is not parameters[0] or weight.dim() != 1:
        return
    for name in ("variance_epsilon", "eps", "epsilon"):
        eps = getattr(module, name, None)
        if isinstance(eps, float):
            yield from (Found(RMSNormKernel, {"eps": eps, "plus_one": plus}) for plus in (False, True))


def _ffn_candidates(module: nn.Module) -> Iterator[Found]:
    """Assignments of roles to its two or three linears that fit their shapes."""
    children = dict(module.named_children())
    linears = {name: w for name, child in children.items() if (w := _weight(child)) is not None}
    others = [child for name, child in children.items() if name not in linears]
    if len(linears) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return
    if len(list(module.parameters(recurse=False))):
        return
    for activation in _activations(module):
        for order in permutations(linears, len(linears)):
            first, *gate, last = order
            wide, narrow = linears[first].shape
            fits = linears[last].shape[1] == wide and all(linears[g].shape == (wide, narrow) for g in gate)
            if fits and linears[last].shape[0] == narrow:
                roles = {"linear_in": first, "gate": gate[0] if gate else None, "linear_out": last}
                yield Found(FFNKernel, {**roles, "activation": activation})


def _weight(child: nn.Module) -> Tensor | None:
    """The (out, in) weight of a linear child."""
    if type(child) in (nn.Linear, Linear):
        return child.weight
    utils = sys.modules.get("transformers.pytorch_utils")  # its Conv1D is a linear with weight (in, out)
    if utils is not None and type(child) is utils.Conv1D:
        return child.weight.t()
    return None


def _activations(module: nn.Module) -> Iterator[str]:
    """Which of the ops' activations the module's callables without parameters compute."""
    grid = torch.linspace(-6, 6, 97)
    candidates = [*module.children(), *(v for v in vars(module).values() if callable(v))]
    names = []
    for f in candidates:
        if isinstance(f, nn.Module) and (any(True for _ in f.parameters()) or isinstance(f, nn.Dropout)):
            continue
        try:
            values = f(grid.clone())
        except Exception:  # not an activation
            continue
        if isinstance(values, Tensor) and values.shape == grid.shape:
            near = partial(torch.allclose, values, rtol=1e-5, atol=1e-6)
            names += [name for name in ACTIVATIONS if near(activate(grid, name))]
    yield from dict.fromkeys(names)


def _proved(module: nn.Module, found: Found) -> bool:
    """Whether the op returns what the module returns on random rows, in evaluation and in training."""
    p = next(module.parameters())
    width = p.shape[0]
    if found.mixin is FFNKernel:
        width = _weight(getattr(module, found.roles["linear_in"])).shape[1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    modes = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad(), ops.use("reference"), torch.random.fork_rng():
            ours = _run(module, x, found)
            for training in (False, True):
                for m in modes:  # modules that drop are called as they are: see _why_not_fused
                    m.training = training and not isinstance(m, nn.Dropout)
                if not _same(module.forward(x), ours):
                    return False
    except Exception:  # whatever it is, it is not this
        return False
    finally:
        for m, mode in modes.items():
            m.training = mode
    return True


def _same(theirs: Any, ours: Tensor) -> bool:
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    allowed = 16 * torch.finfo(ours.dtype).eps * (1 + theirs.abs().max())
    return bool(((theirs - ours).abs() <= allowed).all())


def _run(module: nn.Module, x: Tensor, found: Found) -> Tensor:
    run = _run_norm if found.mixin is RMSNormKernel else _run_ffn
    return run(module, x, **found.roles)


def _run_norm(module: nn.Module, x: Tensor, eps: float, plus_one: bool) -> Tensor:
    weight = module.weight + 1 if plus_one else module.weight
    return ops.rms_norm(x, weight.shape, weight, eps)


def _run_ffn(
    module: nn.Module, x: Tensor, linear_in: str, gate: str | None, linear_out: str, activation: str
) -> Tensor:
    first, last = getattr(module, linear_in), getattr(module, linear_out)
    up = getattr(module, gate) if gate else None  # then the activation is applied to the gate
    return ops.ffn(
        x, _weight(first), first.bias, _weight(last), last.bias, activation,
        weight_gate=None if up is None else _weight(up), bias_gate=None if up is None else up.bias,
    )  # fmt: skip


def _why_not_fused(module: nn.Module, extra: Any) -> str | None:
    if extra:
        return "it was called with further arguments"
    roles = getattr(module, ROLES)
    for name in filter(None, (roles["linear_in"], roles["gate"], roles["linear_out"])):
        child = getattr(module, name)
        if _weight(child) is None or hooked(child):
            return f"{name} is a {type(child).__name__}, or has hooks or a forward of its own"
    for child in module.children():
        if isinstance(child, nn.Dropout) and child.training and child.p > 0:
            return f"dropout {child.p} while training"
    return None
