"""One step of the user's model: what runs, on which batch, with which loss and optimizer."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

MODES = ("train", "inference")
Phase = Callable[[str], AbstractContextManager]


def fused_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's fastest own AdamW, with which a model trains unless another optimizer is given."""
    return torch.optim.AdamW(parameters, lr=0.0, fused=True)


@dataclass
class Workload:
    """A model and what one step of it is.

    Attributes:
        model: any module.
        batch: a tensor, a tuple of arguments, a mapping of keyword arguments, or an iterator of these, whose
            waiting time is then measured.
        mode: "train" (forward, loss, backward, optimizer) or "inference" (forward under no_grad).
        loss_fn: called as loss_fn(output, batch); None finds the loss (`find_loss`).
        make_optimizer: parameters -> optimizer.
        dtype: torch.bfloat16 or float16 runs forward under autocast.
        kv_cache: tensors that hold keys and values.
    """

    model: nn.Module
    batch: Any
    mode: str = "train"
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = fused_adamw
    dtype: torch.dtype = torch.float32
    kv_cache: tuple[Tensor, ...] = ()
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    logits: torch.Size | None = None  # shape of the last step's
    notes: dict[str, None] = field(default_factory=dict)  # what was assumed
    tokens: int = 0  # positions in the last batch

    @property
    def device(self) -> str:
        first = next(iter(self.model.parameters()), None)
        return "cpu" if first is None else first.device.type

    def prepare(self) -> None:
        """Set the mode of the model, and make the optimizer."""
        self.model.train(self.mode == "train")
        if self.mode == "train" and self.optimizer is None:
            wanted = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self.make_optimizer(wanted)

    def step(self, phase: Phase = lambda name: nullcontext()) -> None:
        """Run one; every part of it inside `phase(name)`, of `trace.PHASES`."""
        with phase("data"):
            batch = self.next_batch()
        with phase("forward"), torch.set_grad_enabled(self.mode == "train"):
            out, loss = self._forward(batch)
        if self.mode != "train":
            return
        del out
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def next_batch(self) -> Any:
        try:
            batch = next(self.batch) if isinstance(self.batch, Iterator) else self.batch
        except StopIteration:
            raise ValueError(
                "diagnose: batch has no more elements, expected a DataLoader or another iterable with at "
                "least one batch that can be begun again"
            ) from None
        self.tokens = count_tokens(batch)
        return batch

    def _forward(self, batch: Any) -> tuple[Any, Tensor | None]:
        args, kwargs = arguments(batch)
        autocast = self.dtype != torch.float32
        with torch.autocast(self.device, dtype=self.dtype if autocast else None, enabled=autocast):
            out = self.model(*args, **kwargs)
            self.logits = _logits(out)
            if self.mode != "train":
                return out, None
            if self.loss_fn is not None:
                return out, self.loss_fn(out, batch)
            return out, find_loss(out, batch, self.notes)

    def faked(self, mode: FakeTensorMode, change: Callable[[nn.Module], Any] | None = None) -> "Workload":
        """The same with fake tensors, which have shapes and no data; `change` edits the copy's model."""
        batch = self.next_batch()
        with FakeCopyMode(mode):
            model, batch, cache = copy.deepcopy((self.model, batch, self.kv_cache))
        twin = replace(self, model=model, batch=batch, kv_cache=cache, optimizer=None, notes={})
        if change is not None:
            change(twin.model)
        return twin

    def repeated(self, times: int) -> "Workload":
        """The same with every batch `times` as large."""

        def more(t: Tensor) -> Tensor:
            return t.repeat(times, *[1] * (t.dim() - 1)) if t.dim() else t

        batch, cache = tree_map_only(Tensor, more, (self.next_batch(), self.kv_cache))
        return replace(self, batch=batch, kv_cache=cache, optimizer=None, notes={})

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Afterwards the model is as it was: gradients, buffers, mode, and the random generators."""
        gradients = {p: p.grad for p in self.model.parameters()}
        buffers = {b: b.detach().clone() for b in self.model.buffers()}
        training = {module: module.training for module in self.model.modules()}
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                for p in gradients:
                    p.grad = None
                yield
            finally:
                for p, gradient in gradients.items():
                    p.grad = gradient
                for b, value in buffers.items():
                    b.detach().copy_(value)
                for module, was in training.items():
                    module.training = was


def arguments(batch: Any) -> tuple[tuple, dict]:
    """How a batch is given to a model: a mapping by name, a tuple or list in order, else as the only one."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def count_tokens(batch: Any) -> int:
    """Positions that a step works on: elements of the first integer tensor, or rows of the first tensor."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    whole = next((t for t in tensors if not t.is_floating_point()), None)
    if whole is not None:
        return whole.numel()
    return tensors[0].numel() // tensors[0].shape[-1] if tensors else 1


def find_loss(out: Any, batch: Any, notes: dict[str, None]) -> Tensor:
    """The loss in what a model returned, or one that costs what a usual one does.

    In this order: `.loss`, a scalar of it, cross-entropy of logits against the batch's token ids, and the
    mean square of its first tensor; the latter two are noted.
    """
    loss = getattr(out, "loss", None)
    if loss is None and isinstance(out, Mapping):
        loss = out.get("loss")
    if isinstance(loss, Tensor):
        return loss
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    scalar = next((t for t in tensors if t.dim() == 0 and t.requires_grad), None)
    if scalar is not None:
        return scalar
    if not tensors:
        raise ValueError(f"diagnose: the model returned {type(out).__name__} without a floating-point tensor")
    tokens = next((t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dtype == torch.int64), None)
    logits = tensors[0]
    if tokens is not None and logits.shape[:-1] == tokens.shape:
        notes["no loss was given: cross-entropy of the output against the input tokens stands for it"] = None
        return F.cross_entropy(logits.flatten(0, -2), tokens.flatten() % logits.shape[-1])
    notes["no loss was given: the mean square of the output stands for it"] = None
    return logits.float().square().mean()


def _logits(out: Any) -> torch.Size | None:
    """The shape of the largest floating-point tensor of an output."""
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]
    largest = max(tensors, key=Tensor.numel, default=None)
    return None if largest is None else largest.shape


def check_batch(model: nn.Module, batch: Any) -> None:
    """Refuse a batch that the model cannot take by its number or names of arguments.

    Raises:
        ValueError: what does not fit.
    """
    args, kwargs = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"diagnose: batch does not fit {type(model).__name__}.forward: {error}; expected a tensor, a "
            "tuple of arguments or a mapping of keyword arguments"
        ) from None
