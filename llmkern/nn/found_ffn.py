"""Feed-forward layers in somebody's code: which child is which, and all of them as one op."""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.activation import ACTIVATIONS, activate
from .children import hooked, unfused
from .kernel_class import ROLES, Kernel
from .linear import Linear


class Roles(NamedTuple):
    """Names of children.

    Attributes:
        linear_in, linear_out: the linears before and after the activation.
        gate: the linear whose output goes through the activation, or None.
        packed: linear_in holds two, "gate first" or "gate last", or None.
        activation: as `ops.ffn` calls it.
        inner, last: the dropouts behind the activation and behind linear_out, or None.
    """

    linear_in: str
    linear_out: str
    gate: str | None
    packed: str | None
    activation: str
    inner: str | None
    last: str | None


class FFNKernel(Kernel):
    """Linear, activation, linear, or with a gate, as one fused op."""

    kind = "ffn"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reason := _why_not_fused(self, args or kwargs):
            unfused(type(self).__qualname__, reason, *self.children())
            return super().forward(x, *args, **kwargs)
        return self.compute(x, **getattr(self, ROLES))

    def compute(self: nn.Module, x: Tensor, **roles: Any) -> Tensor:
        names = Roles(**roles)
        first, last = getattr(self, names.linear_in), getattr(self, names.linear_out)
        up, gate = (_weight(first), first.bias), (None, None)
        if names.gate:  # then the activation is applied to the gate
            child = getattr(self, names.gate)
            gate = _weight(child), child.bias
        elif names.packed:
            halves = [(None, None) if t is None else t.chunk(2) for t in up]
            up, gate = zip(*halves) if names.packed == "gate last" else zip(*(h[::-1] for h in halves))
        return ops.ffn(
            x, *up, _weight(last), last.bias, names.activation, weight_gate=gate[0], bias_gate=gate[1],
            dropout_p=_rate(self, names.inner), output_dropout_p=_rate(self, names.last),
        )  # fmt: skip

    @staticmethod
    def width(module: nn.Module, linear_in: str) -> int:
        """Of the rows that it takes."""
        return _weight(getattr(module, linear_in)).shape[1]


def ffn_candidates(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Assignments of `Roles` to its two or three linears that fit their shapes."""
    children = dict(module.named_children())
    linears = {name: w for name, child in children.items() if (w := _weight(child)) is not None}
    others = [child for name, child in children.items() if name not in linears]
    if len(linears) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return
    if any(True for _ in module.parameters(recurse=False)):
        return
    drops = _where_dropped(module, linears)
    if drops is None:
        return
    for activation in _activations(module):
        for order, packed in _orders(linears):
            first, *gate, last = order
            yield Roles(first, last, gate[0] if gate else None, packed, activation, *drops)._asdict()


def _orders(linears: dict[str, Tensor]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Orders of the linears whose shapes fit together, and how the first is packed."""
    for order in permutations(linears):
        first, *gate, last = (linears[name].shape for name in order)
        if last[0] != first[1] or any(g != first for g in gate):
            continue
        if last[1] == first[0]:
            yield order, None
        elif not gate and 2 * last[1] == first[0]:
            yield from ((order, packed) for packed in ("gate first", "gate last"))


def _weight(child: nn.Module) -> Tensor | None:
    """The (out, in) weight of a linear child."""
    if type(child) in (nn.Linear, Linear):
        return child.weight
    utils = sys.modules.get("transformers.pytorch_utils")  # its Conv1D is a linear with weight (in, out)
    if utils is not None and type(child) is utils.Conv1D:
        return child.weight.t()
    return None


def _activations(module: nn.Module) -> Iterator[str]:
    """Which of the ops' activations the module's callables without parameters compute; or any."""
    grid = torch.linspace(-6, 6, 97)
    candidates = [*module.children(), *(v for v in vars(module).values() if callable(v))]
    names, seen = [], False
    for f in candidates:
        if isinstance(f, nn.Module) and (any(True for _ in f.parameters()) or isinstance(f, nn.Dropout)):
            continue
        try:
            values = f(grid.clone())
        except Exception:  # not an activation
            continue
        if isinstance(values, Tensor) and values.shape == grid.shape:
            seen = True
            near = partial(torch.allclose, values, rtol=1e-5, atol=1e-6)
            names += [name for name in ACTIVATIONS if near(activate(grid, name))]
    yield from dict.fromkeys(names if seen else ACTIVATIONS)  # in sight, or a function in its forward


def _where_dropped(module: nn.Module, linears: dict[str, Tensor]) -> tuple[str | None, str | None] | None:
    """The names of the dropouts behind the activation and at the end; None if they are elsewhere."""
    drops = {name: child for name, child in module.named_children() if isinstance(child, nn.Dropout)}
    if not drops:
        return None, None
    if any(hooked(d) or type(d) is not nn.Dropout for d in drops.values()):
        return None
    inputs = {w.shape[1] for w in linears.values()}
    for width in inputs:
        places: dict[str, str | None] = {"inner": None, "last": None}
        y, seen = _outputs(module, drops, width)
        for name, out in seen:
            behind = "last" if out is y else "inner" if out.shape[-1] in inputs - {width} else None
            if behind is None or places[behind]:
                break
            places[behind] = name
        else:
            if y is not None and len(seen) == len(drops):
                return places["inner"], places["last"]
    return None


def _outputs(
    module: nn.Module, drops: dict[str, nn.Dropout], width: int
) -> tuple[Tensor | None, list[tuple[str, Tensor]]]:
    """What the module and its dropouts return in evaluation for a row of `width`; None if it takes none."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        d.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out)))
        for name, d in drops.items()
    ]
    modes = {m: m.training for m in module.modules()}
    p = next(module.parameters())
    try:
        module.eval()
        with torch.no_grad():
            return module.forward(torch.zeros(2, width, dtype=p.dtype, device=p.device)), seen
    except Exception:  # not the width of its input
        return None, []
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes.items():
            m.training = mode


def _rate(module: nn.Module, name: str | None) -> float:
    if name is None:
        return 0.0
    dropout = getattr(module, name)
    return dropout.p if dropout.training else 0.0


def _why_not_fused(module: nn.Module, extra: Any) -> str | None:
    if extra:
        return "it was called with further arguments"
    roles = Roles(**getattr(module, ROLES))
    for name in filter(None, (roles.linear_in, roles.gate, roles.linear_out)):
        child = getattr(module, name)
        if _weight(child) is None or hooked(child):
            return f"{name} is a {type(child).__name__}, or has hooks or a forward of its own"
    for name in filter(None, (roles.inner, roles.last)):
        if type(getattr(module, name)) is not nn.Dropout or hooked(getattr(module, name)):
            return f"{name} is a {type(getattr(module, name)).__name__}, or has hooks"
    return None
