"""The op record and the table of ops.

An op is one class, written once.  Everything else is derived from it here: the torch schemas, the
dispatch by device, the meta kernel, autograd, double backward and the FLOP count.  Tests, fuzzing,
benchmarks, documentation and `diagnose` read the same record.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

from . import dispatch, sharding
from .dispatch import tensors
from .sharding import Split

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
LIBRARY = torch.library.Library("llmkern", "DEF")
OPS: dict[str, "Op"] = {}


class Cost(NamedTuple):
    """Work of one call: floating-point operations, and bytes that must cross the memory bus once."""

    flops: float
    bytes: float


class Sample(NamedTuple):
    """Arguments of an op's public function, and what is special about them."""

    label: str
    args: tuple
    kwargs: dict

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        """The same sample with `change` applied to every floating-point tensor, also in lists."""

        def visit(value: Any) -> Any:
            if isinstance(value, list):
                return [visit(v) for v in value]
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Sample(
            self.label,
            tuple(visit(v) for v in self.args),
            {k: visit(v) for k, v in self.kwargs.items()},
        )


@dataclass
class Make:
    """Random inputs for samples: `make(2, 3)` is a normal (2, 3) tensor of this dtype and device."""

    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0
    generator: torch.Generator = field(init=False)
    choices: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.choices = random.Random(self.seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def pick(self, *values: Any) -> Any:
        """One of `values`."""
        return self.choices.choice(values)

    def size(self, high: int) -> int:
        """A size from 1 to `high`: small ones, and those around multiples of 16, more often."""
        around = 16 * self.choices.randint(1, max(1, high // 16)) + self.choices.randint(-1, 1)
        return min(
            high, self.pick(1, self.choices.randint(1, min(high, 9)), self.choices.randint(1, high), around)
        )

    def laid_out(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A normal tensor of this shape with any strides and offset."""
        layout = self.choices.randrange(5)
        if layout == 0 and len(shape) > 1:
            return self(*shape[:-2], shape[-1], shape[-2], scale=scale).mT
        if layout == 1:
            return self(*shape[:-1], 2 * shape[-1], scale=scale)[..., ::2]
        if layout == 2:  # starts between two cache lines
            return self(math.prod(shape) + 3, scale=scale)[3:].view(shape)
        return self(*shape, scale=scale)


class Op:
    """One operation.  Subclass it in `llmkern/ops/<family>.py` and decorate with `@register`.

    Forward and backward below name the two halves of the op: `llmkern::<name>_fwd` and
    `llmkern::<name>_bwd`.  A kernel in `kernels/<family>.py` or `csrc/<family>.cpp` has the name of
    its half and takes its arguments, then its outputs, already allocated.

    A class holds, all static:
        reference(*args) -> outputs            forward by the paper's formula; annotated, so that the
                                               schema is read from it; runs in any dtype
        outputs(*args) -> outputs              the same, empty: shapes, strides and dtypes
        save(args, outputs) -> saved           what backward needs, after the incoming gradients
        replay(*saved) -> args                 forward arguments again (for double backward); None, the
                                               default, where the formula of backward is right as it
                                               stands: linear ops, and those that save only results
        reference_bwd(*grads, *saved, needs)   gradients by formula; `needs[i]` tells if the i-th is wanted
        outputs_bwd(*grads, *saved, needs)     the same, empty; an unwanted one has 0 elements
        refuse(backend, *args) -> str | None   why a fast forward kernel cannot take these arguments;
        refuse_bwd                             the same for backward
        flops(*args), flops_bwd(*args)         multiply and add count as two
        splits(half, args) -> [Split]          how a half may be split over devices, from its arguments by
                                               name; without, every device has all (sharding.py)
        unread(*args) -> int                   bytes of forward's arguments that it need not read
        scratch(half, args) -> int             bytes that the C++ kernel of a half takes beside its outputs,
                                               where they matter, from its arguments by name (scratch.py)
        public(...)                            the function that users call
        eager(...)                             the same by torch itself, with the same arguments
        samples(make), benchmarks(make)        arguments of `public`, ordinary and nasty; realistic
        draw(make)                             arguments of `public` drawn at random, for fuzzing
        variants(make)                         further ones, that with `benchmarks` reach every variant
                                               of the Triton kernels: compiled ahead of time, not run
        condition(*args, **kwargs)             S of the error rule (docs/numerics.md)

    An op without `gradients` has no backward half: of the above it needs reference, outputs, flops,
    public, eager, samples, benchmarks and draw.  One that `mutates` arguments writes to them in place;
    these have the same names in `public` and `eager`, and may be lists of tensors.

    An op of inference makes a result of each row, or sequence, of its `batched` arguments.  The C++ kernels
    promise it the same bits alone as among others, unless `varies` says what may change them.
    """

    name: str
    family: str
    source: str
    constant: tuple[str, ...] = ()  # tensor arguments of `public` that have no gradient
    results: int = 1  # the first `results` outputs are the op's results, the others only saved
    materialize: bool = False  # gradients of results that nobody used arrive as zeros, not as None
    gradients: dict[str, int] = {}  # forward argument -> index of its gradient among backward's outputs
    passes: dict[str, int] = {}  # forward argument -> index of the incoming gradient that is its own
    mutates: tuple[str, ...] = ()  # arguments that forward writes to
    batched: tuple[str, ...] = ()  # arguments of `public` with a row, or sequence, for each result
    varies: str = ""  # why a result's last bits may depend on the number of rows; empty: they do not
    lowers: bool = False  # computes in the autocast dtype, as torch's matrix products do
    fwd: Any  # torch.ops.llmkern.<name>_fwd.default, set by @register
    bwd: Any = None  # None without gradients

    @staticmethod
    def replay(*saved: Any) -> tuple | None:
        return None

    @staticmethod
    def refuse(backend: str, *args: Any) -> str | None:
        return None

    @staticmethod
    def refuse_bwd(backend: str, *args: Any) -> str | None:
        return None

    @staticmethod
    def splits(half: str, args: dict[str, Any]) -> Iterator[Split]:
        yield from ()

    @staticmethod
    def unread(*args: Any) -> int:
        return 0

    @staticmethod
    def scratch(half: str, args: dict[str, Any]) -> int:
        return 0

    @staticmethod
    def prepare_grad(grad: Tensor) -> Tensor:
        """Gradients arrive with any strides (`.sum().backward()`: stride 0); kernels want rows."""
        return grad.contiguous()

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        yield from ()

    @staticmethod
    def condition(*args: Any, **kwargs: Any) -> float:
        return 0.0

    @classmethod
    def formula(cls) -> str:
        """The first paragraph of the docstring."""
        return (cls.__doc__ or "").strip().split("\n\n")[0]


def register(cls: type[Op]) -> Op:
    """Put an op into the table: define its schemas, attach its kernels, make it differentiable."""
    op = cls()
    halves = [("fwd", op.reference, op.outputs, op.flops, op.mutates)]
    if op.gradients:
        halves.append(("bwd", op.reference_bwd, op.outputs_bwd, op.flops_bwd, ()))
    for half, reference, outputs, flops, mutates in halves:
        name = f"{op.name}_{half}"
        LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=mutates))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, dispatch.make_kernel(op, half), key)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        LIBRARY.impl(name, outputs, "Meta")
        packet = getattr(torch.ops.llmkern, name)
        setattr(op, half, packet.default)
        register_flop_formula(packet, get_raw=True)(_flop_formula(flops))
    op.apply = _with_autograd(op) if op.gradients else _without_autograd(op)
    OPS[op.name] = op
    return op


def _flop_formula(flops: Callable[..., float]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: int(flops(*args))


def _with_autograd(op: Op) -> Callable[..., Any]:
    """Autograd around the two halves of `op`; skipped when no input needs a gradient."""
    names = [a.name for a in op.fwd._schema.arguments]
    slots = [op.gradients.get(name) for name in names]
    passed = [op.passes.get(name) for name in names]
    count = len(op.bwd._schema.returns)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            outs = op.fwd(*args)
            outs = outs if isinstance(outs, tuple) else (outs,)
            saved = op.save(args, outs)
            ctx.constants = [None if isinstance(s, Tensor) else s for s in saved]
            ctx.is_tensor = [isinstance(s, Tensor) for s in saved]
            ctx.save_for_backward(*(s for s in saved if isinstance(s, Tensor)))
            ctx.set_materialize_grads(op.materialize)
            ctx.like = outs[0].shape, outs[0].dtype, outs[0].device
            return outs[: op.results] if op.results > 1 else outs[0]

        @staticmethod
        def backward(ctx, *grads):
            tensors = iter(ctx.saved_tensors)
            saved = [next(tensors) if t else c for t, c in zip(ctx.is_tensor, ctx.constants)]
            if grads[0] is None:  # only a secondary result was used
                shape, dtype, device = ctx.like
                grads = (torch.zeros(shape, dtype=dtype, device=device), *grads[1:])
            needs = [False] * count
            for slot, wanted in zip(slots, ctx.needs_input_grad):
                if slot is not None and wanted:
                    needs[slot] = True
            if torch.is_grad_enabled():  # create_graph=True: formulas that autograd can see through
                args = op.replay(*saved)
                if args is not None:
                    outs = op.reference(*args)
                    saved = op.save(args, outs if isinstance(outs, tuple) else (outs,))
                found = op.reference_bwd(*grads, *saved, needs)
            else:
                given = (*(None if g is None else op.prepare_grad(g) for g in grads), *saved)
                if type(given[0]) not in _PLAIN:
                    given = sharding.look_at(given, OPS)
                found = op.bwd(*given, needs)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(
                None if not wanted
                else found[slot] if slot is not None
                else grads[passing] if passing is not None
                else None
                for slot, passing, wanted in zip(slots, passed, ctx.needs_input_grad)
            )  # fmt: skip

    second = min(1, len(names) - 1)
    positions = [i for i, both in enumerate(zip(slots, passed)) if both != (None, None)]

    def apply(*args):
        if not torch.compiler.is_compiling() and _transformed():
            return _by_reference(op, args)
        if type(args[0]) not in _PLAIN or type(args[second]) not in _PLAIN:
            args = sharding.look_at(args, OPS)
        if torch.is_grad_enabled():
            for i in positions:
                if args[i] is not None and args[i].requires_grad:
                    return Function.apply(*args)
        outs = op.fwd(*args)
        if op.results > 1:
            return outs[: op.results]
        return outs[0] if isinstance(outs, tuple) else outs

    return apply


def _transformed() -> bool:
    """Whether torch.func, or forward-mode differentiation, looks at what is computed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _by_reference(op: Op, args: tuple) -> Any:
    """The results of formulas that any transform of torch can see through."""
    dispatch.fall_back(f"llmkern::{op.name}", "torch.func and forward-mode derivatives need its formulas")
    outs = op.reference(*args)
    if op.gradients and isinstance(outs, tuple):
        return outs[: op.results] if op.results > 1 else outs[0]
    return outs


def _without_autograd(op: Op) -> Callable[..., Any]:
    """The forward half, for ops of inference and of optimizers."""
    second = min(1, len(op.fwd._schema.arguments) - 1)

    def apply(*args):
        if not torch.compiler.is_compiling() and _transformed():
            return _by_reference(op, args)
        if type(args[0]) not in _PLAIN or type(args[second]) not in _PLAIN:
            args = sharding.look_at(args, OPS)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(args)):
            raise RuntimeError(
                f"{op.name} has no backward, and an argument requires a gradient; "
                "call it under torch.no_grad() or with detached tensors"
            )
        if op.mutates and any(map(sharding.is_sharded, args)):
            return sharding.run_in_place(op, args)
        return op.fwd(*args)

    return apply


def empty(x: Tensor) -> Tensor:
    """The 0-element tensor that stands for an output nobody wants."""
    return x.new_empty(0)


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op accumulates: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(device: str) -> bool:
    """`torch.is_autocast_enabled`, which raises for devices without autocast, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating-point tensors to the autocast dtype, as torch does for linear and attention."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def nbytes(*values: Any) -> int:
    """Bytes of all the tensors among `values`, each counted once."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def cost(op: Op, half: str, *args: Any) -> Cost:
    """FLOPs of one half of `op`, and the bytes of its inputs and outputs."""
    flops = op.flops if half == "fwd" else op.flops_bwd
    outputs = op.outputs if half == "fwd" else op.outputs_bwd
    meta = tree_map_only(Tensor, lambda t: t.to("meta"), args)
    outs = outputs(*meta)
    read = nbytes(*args) - (op.unread(*args) if half == "fwd" else 0)
    return Cost(flops(*args), read + nbytes(*(outs if isinstance(outs, tuple) else (outs,))))


def samples(op: Op, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """The op's sample inputs in `dtype` on `device`."""
    yield from op.samples(Make(dtype, device, seed))


def differentiable(op: Op, sample: Sample) -> list[Tensor]:
    """The tensors among a sample's arguments that can have a gradient."""
    if not op.gradients:
        return []
    bound = inspect.signature(op.public).bind(*sample.args, **sample.kwargs).arguments
    return [
        v for name, v in bound.items()
        if isinstance(v, Tensor) and v.is_floating_point() and name not in op.constant
    ]  # fmt: skip


def rows(x: Tensor, width: int) -> int:
    """How many rows of `width` elements `x` holds."""
    return x.numel() // width if width else math.prod(x.shape[:-1])
