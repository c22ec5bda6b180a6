"""Runs Gluon kernels for Hopper on the CPU: the same source, over a model of the machine at its worst.

Triton's interpreter has no Gluon.  Here a kernel's functions run as plain Python on torch tensors, one
program after another, each warp group a thread of which one runs at a time.  What the hardware does
asynchronously happens as late as it may, so that a kernel which does not wait reads rubbish:

* a TMA load spoils its destination when it is issued, and delivers when its barrier is waited for;
* a warpgroup product reads its operands when it is issued and when it is waited for, and both must be equal;
  its result is NaN until then;
* a TMA store delivers when it is waited for, and its source must be as it was, and fenced;
* a wait that no thread can end is a deadlock, and is reported as one.

What it does not model: layouts, registers, and the order of warps within a group.
"""

import math
import threading
from collections.abc import Callable, Iterable
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class Deadlock(RuntimeError):
    """No warp group can go on."""


class Hazard(RuntimeError):
    """A read or write that the hardware may do before or after what the kernel means."""


class Turns:
    """Threads of which one runs at a time; it goes on to the next when it has to wait."""

    def __init__(self, tasks: list[Callable[[], None]]):
        self.tasks = tasks
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.alive = set(range(len(tasks)))
        self.current = 0
        self.change = threading.Condition()
        self.failure: BaseException | None = None
        self.local = threading.local()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._task, args=(i,), daemon=True) for i in range(len(self.tasks))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def _task(self, index: int) -> None:
        self.local.index = index
        try:
            self.wait(lambda: True)
            self.tasks[index]()
        except BaseException as error:
            self.failure = self.failure or error
        with self.change:
            self.alive.discard(index)
            self._pass_on()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Let others run until `ready`."""
        index = self.local.index
        with self.change:
            if self.current == index and ready():
                return
            self.waiting[index] = ready
            if self.current == index:
                self._pass_on()
            self.change.wait_for(lambda: self.failure or (self.current == index and ready()))
            self.waiting.pop(index, None)
            if self.failure:
                raise self.failure

    def _pass_on(self) -> None:
        order = sorted(self.alive, key=lambda i: (i - self.current - 1) % len(self.tasks))
        able = [i for i in order if i not in self.waiting or self.waiting[i]()]
        if order and not able:
            self.failure = self.failure or Deadlock(f"warp groups {order} wait for each other")
        self.current = able[0] if able else self.current
        self.change.notify_all()


class Shared:
    """Shared memory or a view of it; `owner` is the buffer that a fence or a load is about."""

    def __init__(self, data: Tensor, owner: "Shared | None" = None):
        self.data, self.owner = data, owner or self
        self.dirty = False  # written by threads, and not fenced since

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))

    def index(self, i: int) -> "Shared":
        if not 0 <= i < self.data.shape[0]:
            raise Hazard(f"buffer {i} of {self.data.shape[0]}")
        return Shared(self.data[i], self.owner)

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape), self.owner)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.owner)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, start, length), self.owner)

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.owner.dirty = True

    def load(self, layout: Any = None) -> Tensor:
        return self.data.clone()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0
        self.loads: list[Callable[[], None]] = []
        self.dirty = False  # made by threads, and not fenced since

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.dirty = True

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        if not self.count:
            raise Hazard("a barrier without init")
        self.pending -= count
        self.bytes += expected
        if self.pending < 0:
            raise Hazard("more arrivals at a barrier than it counts")
        self.settle()

    def settle(self) -> None:
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase ^ 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over; what is on its way comes only now."""
        if self.phase == parity and not self.pending:
            for load in self.loads:
                load()
            self.loads.clear()
            self.settle()
        return self.phase != parity


class Descriptor:
    """A TMA descriptor: boxes of a tensor, zero outside it."""

    def __init__(self, tensor: Tensor, box: list[int]):
        self.tensor, self.block_shape, self.dtype, self.layout = tensor, box, tensor.dtype, None
        self.nbytes_per_cta = math.prod(box) * tensor.element_size()
        for stride, size in zip(tensor.stride()[:-1], tensor.shape):
            assert size == 1 or stride * tensor.element_size() % 16 == 0, (
                "a stride is no multiple of 16 bytes"
            )
        assert tensor.stride(-1) == 1 and box[-1] * tensor.element_size() >= 16

    def places(self, at: Iterable[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(where in the tensor, where in the box)."""
        in_tensor, in_box = [], []
        for start, length, size in zip(at, self.block_shape, self.tensor.shape):
            low, high = max(start, 0), max(min(start + length, size), max(start, 0))
            in_tensor.append(slice(low, high))
            in_box.append(slice(low - start, high - start))
        return tuple(in_tensor), tuple(in_box)


class Machine:
    """One program's state, and the names that a kernel sees in place of Gluon's."""

    def __init__(self, program: int, programs: int):
        self.program, self.programs = program, programs
        self.turns: Turns | None = None
        self.products: dict[int, list[tuple]] = {}
        self.stores: dict[int, list[tuple]] = {}
        self.shared: list[Shared | Barrier] = []

    def group(self) -> int:
        return self.turns.local.index

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any = None) -> Shared:
        data = torch.empty(shape, dtype=dtype)
        return Shared(data.fill_(float("nan")) if dtype.is_floating_point else data.zero_())

    def barriers(self, batch: int) -> SimpleNamespace:
        each = [Barrier() for _ in range(batch)]
        self.shared += each
        return SimpleNamespace(index=lambda i: each[i])

    def warp_specialize(self, functions: list[tuple], warps: list[int], registers: list[int]) -> None:
        self.turns = Turns([lambda f=f, a=a: f(*a) for f, a in functions])
        for i in range(len(functions)):
            self.products[i], self.stores[i] = [], []
        self.turns.run()
        for i, stores in self.stores.items():
            if stores:
                raise Hazard(f"warp group {i} ends before its stores have read their source")

    def load(self, desc: Descriptor, at: list[int], barrier: Barrier, to: Shared) -> None:
        assert list(desc.block_shape) == to.shape, (desc.block_shape, to.shape)
        to.data.fill_(float("nan"))
        if barrier.dirty:
            raise Hazard("a TMA load on a barrier that was made and not fenced")

        def deliver() -> None:
            source, box = desc.places(at)
            to.data.zero_()
            to.data[box] = desc.tensor[source]
            barrier.bytes -= desc.nbytes_per_cta

        barrier.loads.append(deliver)

    def store(self, desc: Descriptor, at: list[int], source: Shared) -> None:
        assert list(desc.block_shape) == source.shape
        if source.owner.dirty:
            raise Hazard("a TMA store of shared memory that was written and not fenced")
        self.stores[self.group()].append((desc, at, source.data, source.data.clone()))

    def store_wait(self, pendings: int) -> None:
        stores = self.stores[self.group()]
        while len(stores) > pendings:
            desc, at, source, before = stores.pop(0)
            if not torch.equal(source, before):
                raise Hazard("the source of a TMA store changed before it was read")
            where, box = desc.places(at)
            desc.tensor[where] = before[box]

    def fence(self) -> None:
        for cell in self.shared:
            cell.dirty = False

    def product(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
        operands = [x.data for x in (a, b) if isinstance(x, Shared)]
        left = a.data if isinstance(a, Shared) else a
        result = left.float() @ b.data.float() + (acc if use_acc else 0)
        token = torch.full_like(result, float("nan"))
        self.products[self.group()].append((token, result, operands, [x.clone() for x in operands]))
        return token

    def product_wait(self, num_outstanding: int, deps: tuple) -> Any:
        products = self.products[self.group()]
        while len(products) > num_outstanding:
            token, result, operands, before = products.pop(0)
            for x, y in zip(operands, before):
                if not torch.equal(x.nan_to_num(), y.nan_to_num()):
                    raise Hazard("an operand of a product changed while it ran")
            token.copy_(result)
        out = tuple(d.clone() for d in deps)
        return out[0] if len(out) == 1 else out

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.turns.wait(lambda: barrier.passed(parity))

    def names(self) -> dict[str, Any]:
        def allocate(dtype, shape, layout=None):
            self.shared.append(self.allocate(dtype, shape, layout))
            return self.shared[-1]

        gl = SimpleNamespace(
            constexpr=lambda x: x, float32=torch.float32, int64=torch.int64, bfloat16=torch.bfloat16,
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs,
            cdiv=lambda a, b: -(-a // b), static_range=range, range=range,
            maximum=_either(torch.maximum, max), minimum=_either(torch.minimum, min),
            arange=lambda a, b, layout=None: torch.arange(a, b), cast=lambda x, dtype: x,
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2, log2=torch.log2, where=torch.where, convert_layout=lambda x, layout: x,
            load=_gather, store=_scatter, allocate_shared_memory=allocate,
            warp_specialize=self.warp_specialize,
            SliceLayout=_layout, NVMMADistributedLayout=_layout, DotOperandLayout=_layout,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            allocate_mbarrier=self.barriers, init=lambda b, count: b.init(count), wait=self.wait,
            arrive=lambda b, count=1: b.arrive(count), expect=lambda b, n: b.arrive(1, n),
        )  # fmt: skip
        tma = SimpleNamespace(async_load=self.load, async_store=self.store, store_wait=self.store_wait)
        return {
            "gl": gl, "mbarrier": mbarrier, "tma": tma, "fence_async_shared": self.fence,
            "warpgroup_mma": self.product, "warpgroup_mma_wait": self.product_wait,
        }  # fmt: skip


class _layout:
    """Any layout: where elements lie does not change what they are."""

    def __init__(self, *args: Any):
        self.parent = self


def _either(of_tensors: Callable, of_numbers: Callable) -> Callable:
    def either(a: Any, b: Any) -> Any:
        return of_tensors(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else of_numbers(a, b)

    return either


class Pointer:
    """A pointer into a contiguous tensor."""

    def __init__(self, data: Tensor, offset: Any = 0):
        self.data, self.offset = data.view(-1), offset

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.data, self.offset + more)


def _gather(pointer: Pointer, mask: Tensor, other: float = 0.0) -> Tensor:
    at = pointer.offset
    inside = torch.where(mask, at, 0)
    if bool(((at < 0) | (at >= pointer.data.numel()))[mask].any()):
        raise Hazard("a load outside its tensor")
    return torch.where(mask, pointer.data[inside], other)


def _scatter(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at = pointer.offset[mask]
    if bool(((at < 0) | (at >= pointer.data.numel())).any()):
        raise Hazard("a store outside its tensor")
    pointer.data[at] = value[mask]


class _Type:
    """What `x.type` is of a tensor in a kernel."""

    layout = _layout()


def functions(module: dict[str, Any]) -> dict[str, FunctionType]:
    """The kernels of a module, as Python functions: of `@gluon.jit` ones what they were made of."""
    found = {name: getattr(value, "fn", value) for name, value in module.items()}
    return {name: f for name, f in found.items() if isinstance(f, FunctionType) and f.__globals__ is module}


def launch(module: dict[str, Any], kernel: str, programs: int, *args: Any) -> None:
    """Run a kernel of a module: descriptors as `Descriptor`, tensors as `Pointer`, numbers as they are."""
    constants = {k: v.value for k, v in module.items() if type(v).__name__ == "constexpr"}
    for program in range(programs):
        names = {"__builtins__": __builtins__, **constants, **Machine(program, programs).names()}
        for name, f in functions(module).items():
            names[name] = FunctionType(f.__code__, names, name, f.__defaults__)
        with mock.patch.object(Tensor, "type", _Type):  # in a kernel it is no method
            names[kernel](*args)
