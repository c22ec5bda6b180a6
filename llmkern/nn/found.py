"""Norms, linears and feed-forward layers in somebody's code, found by structure and proved by running.

No list of names: a module is taken for an RMSNorm, or for a feed-forward layer, when its parameters
have the shapes of one, and then only if with random parameters and input it returns what the op returns.
"""

import copy
import inspect
import math
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from ..ops.dispatch import fall_back
from .children import without_hooks
from .found_ffn import FFNKernel, ffn_candidates
from .kernel_class import ROLES, Kernel

_KNOWN: WeakKeyDictionary[type, dict[tuple, "Found | None"]] = WeakKeyDictionary()  # what was proved
EPS = ("variance_epsilon", "eps", "epsilon")  # what people call it


class Found(NamedTuple):
    """What a module is: the class to mix in, and what that needs to know."""

    mixin: type[Kernel]
    roles: dict[str, Any]


class RMSNormKernel(Kernel):
    """x / sqrt(mean(x²) + eps) times weight, or for Gemma times 1 + weight, on llmkern's kernel."""

    kind = "norm"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.weight.dtype != x.dtype:
            fall_back(type(self).__qualname__, f"x is {x.dtype} and the weight {self.weight.dtype}")
            return super().forward(x, *args, **kwargs)
        return self.compute(x, **getattr(self, ROLES))

    def compute(self: nn.Module, x: Tensor, eps: float, plus_one: bool) -> Tensor:
        weight = self.weight + 1 if plus_one else self.weight
        return ops.rms_norm(x, weight.shape, weight, eps)


class LinearKernel(Kernel):
    """x Wᵀ + b, or x W + b as Hugging Face's Conv1D, on llmkern's kernel for CPUs."""

    kind = "linear"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.weight.device.type != "cpu":
            return super().forward(x, *args, **kwargs)
        return self.compute(x, **getattr(self, ROLES))

    def compute(self: nn.Module, x: Tensor, transposed: bool) -> Tensor:
        weight = self.weight.t() if transposed else self.weight
        return ops.linear(x, weight, getattr(self, "bias", None))


def recognise(module: nn.Module) -> Found | None:
    """What the module is, if it is one of these and its parameters are there to be tried."""
    parameters = list(module.parameters())
    if not parameters or any(not p.is_floating_point() or p.is_meta for p in parameters):
        return None
    if any(is_traceable_wrapper_subclass(p) for p in parameters) or not _takes_one_tensor(module):
        return None
    known, key = _KNOWN.setdefault(type(module), {}), _likeness(module)
    if key not in known:
        with without_hooks(module):
            known[key] = _prove(module)
    return known[key]


def looks_like_one(module: nn.Module) -> bool:
    """Whether its parameters have the shapes of one of these, whatever it computes."""
    with without_hooks(module):
        has_some = next(module.parameters(), None) is not None
        return has_some and _takes_one_tensor(module) and next(_candidates(module), None) is not None


def _prove(module: nn.Module) -> Found | None:
    """The first of its candidates that computes what it computes."""
    found = iter(_candidates(module))
    first = next(found, None)
    trial = None if first is None else _trial(module)
    return next((f for f in chain([first], found) if trial and _proved(trial, f)), None)


def _likeness(module: nn.Module) -> tuple:
    """Equal for modules that compute the same from their parameters, so that one proof is enough."""
    plain = (int, float, str, bool, type(None))
    parts = []
    for m in module.modules():
        values = {
            n: v
            for n, v in vars(m).items()
            if isinstance(v, plain) or (isinstance(v, Hashable) and callable(v))
        }
        parts.append((type(m), *((n, v) for n, v in sorted(values.items()) if n != "training")))
    return tuple(parts), tuple((n, p.shape) for n, p in module.named_parameters())


def _trial(module: nn.Module) -> nn.Module | None:
    """A copy in float32 whose parameters are random: weights near 0, or zeros, would prove anything."""
    try:
        trial = copy.deepcopy(module).float()
    except Exception:  # it holds something that cannot be copied
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trial.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1] if p.dim() > 1 else 1))
    return trial


def _candidates(module: nn.Module) -> Iterator[Found]:
    own = dict(module.named_parameters(recurse=False))
    childless = next(module.children(), None) is None
    weight = own.get("weight")
    if childless and weight is not None and weight.dim() == 1 and len(own) == 1:
        for eps in (v for name in EPS if isinstance(v := getattr(module, name, None), float)):
            yield from (Found(RMSNormKernel, {"eps": eps, "plus_one": plus}) for plus in (False, True))
    if childless and weight is not None and weight.dim() == 2 and set(own) <= {"weight", "bias"}:
        yield from (Found(LinearKernel, {"transposed": t}) for t in (False, True))
    yield from (Found(FFNKernel, roles) for roles in ffn_candidates(module))


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind in (0, 1)]
    return len(required) == 1 and all(
        p.kind != p.KEYWORD_ONLY or p.default is not p.empty for p in parameters
    )


def _proved(module: nn.Module, found: Found) -> bool:
    """Whether the op returns what the module returns on random rows, in evaluation and in training."""
    x = torch.randn(3, _width(module, found), generator=torch.Generator().manual_seed(1))
    x = (x * torch.tensor([[1.0], [4.0], [0.01]])).to(next(module.parameters()).device)
    modes = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad(), ops.use("reference"), torch.random.fork_rng():
            for training in (False, True):
                for m in modes:  # what modules drop is looked at elsewhere: see found_ffn
                    m.training = training and not isinstance(m, nn.Dropout)
                if not _same(module.forward(x), found.mixin.compute(module, x, **found.roles)):
                    return False
    except Exception:  # whatever it is, it is not this
        return False
    finally:
        for m, mode in modes.items():
            m.training = mode
    return True


def _width(module: nn.Module, found: Found) -> int:
    """Of the rows that the module takes."""
    if found.mixin is FFNKernel:
        return FFNKernel.width(module, found.roles["linear_in"])
    shape = module.weight.shape
    return shape[0] if len(shape) == 1 or found.roles["transposed"] else shape[1]


def _same(theirs: Any, ours: Tensor) -> bool:
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    allowed = 2e-5 * theirs.abs().amax(-1, keepdim=True)
    return bool(((theirs - ours).abs() <= allowed).all())
