"""The same model in float64, the judge; and what one forward and backward of a model gives."""

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..swap.example import call

LOW = (torch.float32, torch.bfloat16, torch.float16)
CASTS = {getattr(Tensor, name): Tensor.double for name in ("float", "half", "bfloat16")}
LossFn = Callable[[Any, Any], Tensor]


class InFloat64(TorchFunctionMode):
    """Inside the block, code that names float32, bfloat16 or float16 gets float64.

    So `x.float()` or `softmax(x, dtype=torch.float32)` in a model's code does not round what is to judge.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widen = lambda v: torch.float64 if v in LOW else v  # noqa: E731
        args, kwargs = (
            tree_map(lambda v: widen(v) if isinstance(v, torch.dtype) else v, each)
            for each in (args, kwargs or {})
        )
        return CASTS.get(func, func)(*args, **kwargs)


@contextmanager
def in_float64():
    """`InFloat64`, with float64 as the dtype of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


class Outcome(NamedTuple):
    """What a model gives: outputs by name, its loss, and the gradient of each parameter."""

    outputs: dict[str, Tensor]
    loss: Tensor
    grads: dict[str, Tensor]


class Subject:
    """One copy of the model, and its batch.

    Args:
        model: copied; the copy trains without dropout.
        batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        loss_fn: loss_fn(output, batch), or None.
        float64: whether it is the judge.
    """

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFn | None, float64: bool = False) -> None:
        self.model, self.batch, self.loss_fn, self.float64 = copy.deepcopy(model), batch, loss_fn, float64
        without_dropout(self.model.train())
        if float64:
            self.model.double()
            wide = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
            self.batch = tree_map_only(Tensor, wide, batch)

    def loss(self) -> tuple[Any, Tensor]:
        """The model's output for its batch, and the loss."""
        if not self.float64:
            out = call(self.model, self.batch)
            return out, find_loss(out, self.batch, self.loss_fn)
        with in_float64():
            out = call(self.model, self.batch)
            return out, find_loss(out, self.batch, self.loss_fn)

    def run(self) -> Outcome:
        """One forward and backward."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        out, loss = self.loss()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found = {n: g for n, g in zip(named, grads) if g is not None}
        return Outcome(outputs(out), loss.detach(), found)

    def curve(self, steps: int, learning_rate: float) -> list[float]:
        """The loss before each of `steps` steps of AdamW on the batch, and after the last."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(twin.model.parameters(), lr=learning_rate)
        losses = []
        for _ in range(steps):
            _, loss = twin.loss()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(twin.loss()[1].item())
        return losses


def without_dropout(model: nn.Module) -> None:
    """Every probability of dropping becomes 0: dropout differs from run to run."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def outputs(out: Any) -> dict[str, Tensor]:
    """The floating-point tensors in an output, by name or place."""
    items = out.items() if isinstance(out, Mapping) else enumerate(tree_leaves(out))
    named = {str(name): t for name, t in items if isinstance(t, Tensor) and t.is_floating_point()}
    return {name: t.detach() for name, t in named.items() if t.dim() > 0}


def find_loss(out: Any, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """loss_fn's; else the output's own; else the mean of the outputs with random signs."""
    if loss_fn is not None:
        return loss_fn(out, batch)
    if isinstance(getattr(out, "loss", None), Tensor):
        return out.loss
    leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    scalars = [t for t in leaves if t.dim() == 0]
    if scalars:
        return scalars[0]
    if not leaves:
        raise ValueError("prove: the model returns no floating-point tensor; give loss_fn(output, batch)")
    x = leaves[0]
    signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign().to(x)
    return (x * signs).mean()
