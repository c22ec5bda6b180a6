"""Methods of somebody's module that call functions of torch, made to call llmkern's.

A method is copied with other globals: in the copy `F.cross_entropy` means ours.  The user's function, its
module and torch stay as they are; a module of the class made here runs the copies.
"""

import dis
from collections.abc import Callable, Iterator
from functools import cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from .functional import KERNELS
from .kernel_class import Kernel
from .rotary import rotation

Path = tuple[str, ...]  # ("F", "cross_entropy"): a global name, and attributes of modules


class FunctionsKernel(Kernel):
    """Its own forward, in which functions of torch, or of its module, are llmkern's."""

    kind = "functions"

    @classmethod
    def namespace(cls, own: type[nn.Module], detail: str) -> dict[str, Any]:
        """Copies of the methods that call one of the functions named in `detail`."""
        names = detail.split(",")
        copies = {}
        for name, method in methods(own).items():
            copy = rebind(method, lambda f: _ours(f, names))
            if copy is not method:
                copies[name] = copy
        return copies


def called(own: type[nn.Module]) -> Iterator[Any]:
    """The functions that the methods of a class call, by a global name or as attributes of modules."""
    for method in methods(own).values():
        yield from _called_by(method)


@cache
def methods(own: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class that somebody wrote, the nearest base first."""
    found: dict[str, FunctionType] = {}
    for cls in own.__mro__:
        if cls.__module__.startswith(("torch.", "builtins", "transformers.modeling_utils")):
            break
        for name, value in vars(cls).items():
            if isinstance(value, FunctionType) and not name.startswith("__"):
                found.setdefault(name, value)
    return found


def _ours(f: Any, names: list[str]) -> Callable | None:
    """What to call in place of f, if it is one of the functions named."""
    name = getattr(f, "__name__", None)
    for wanted in names:
        function, _, how = wanted.partition("=")
        if function == name:
            return rotation(f, how == "interleaved") if how else kernel(f)
    return None


def kernel(f: Any) -> Callable | None:
    """What llmkern has for a function of torch, or None."""
    try:
        return KERNELS[f][1]
    except (KeyError, TypeError):  # not one of them; not hashable
        return None


def _called_by(f: FunctionType, seen: tuple[FunctionType, ...] = ()) -> Iterator[Any]:
    if f in seen:
        return
    for _, value in _references(f.__code__, f.__globals__):
        yield value
        if _helper(f, value):
            yield from _called_by(value, (*seen, f))
    for cell in f.__closure__ or ():
        if isinstance(inner := _content(cell), FunctionType):
            yield from _called_by(inner, (*seen, f))


def _helper(f: FunctionType, value: Any) -> bool:
    """Whether it is a function of the same file as f."""
    return isinstance(value, FunctionType) and value.__globals__ is f.__globals__


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _references(code: CodeType, names: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """What the code reads from global names, and from modules by attributes: (path, value)."""
    path: Path = ()
    value: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL" and step.argval in names:
            path, value = (step.argval,), names[step.argval]
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and path and isinstance(value, ModuleType):
            path, value = (*path, step.argval), getattr(value, step.argval, None)
        elif step.opname not in ("CACHE", "PRECALL"):
            path = ()
            continue
        if path and callable(value):
            yield path, value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a lambda, a comprehension
            yield from _references(constant, names)


def rebind(
    f: FunctionType, ours: Callable[[Any], Callable | None], seen: tuple[FunctionType, ...] = ()
) -> FunctionType:
    """A copy of f that calls ours in place of what `ours` replaces; f itself if it calls none of it.

    Functions of the same file and wrapped ones are copied likewise.
    """
    if f in seen:  # it calls itself
        return f
    replaced: dict[Path, Callable] = {}
    for path, value in _references(f.__code__, f.__globals__):
        new = ours(value)
        if new is None and _helper(f, value):
            copy = rebind(value, ours, (*seen, f))
            new = None if copy is value else copy
        if new is not None:
            replaced[path] = new
    cells = [_rebind_cell(cell, ours, (*seen, f)) for cell in f.__closure__ or ()]
    if not replaced and all(a is b for a, b in zip(cells, f.__closure__ or ())):
        return f
    names = dict(f.__globals__)
    for path, new in replaced.items():
        _put(names, path, new)
    if replaced:
        names.pop("__name__", None)  # or torch.compile takes the globals of the module of that name
    copy = FunctionType(f.__code__, names, f.__name__, f.__defaults__, tuple(cells) or None)
    copy.__kwdefaults__, copy.__annotations__ = f.__kwdefaults__, f.__annotations__
    copy.__module__, copy.__qualname__, copy.__doc__ = f.__module__, f.__qualname__, f.__doc__
    copy.__dict__.update(f.__dict__)
    return copy


def _rebind_cell(cell: CellType, ours: Callable, seen: tuple[FunctionType, ...]) -> CellType:
    inner = _content(cell)
    copy = rebind(inner, ours, seen) if isinstance(inner, FunctionType) else inner
    return cell if copy is inner else CellType(copy)


def _put(names: dict[str, Any], path: Path, new: Callable) -> None:
    """Set names[path[0]].path[1]... to `new`, in copies of the modules on the way."""
    first, *rest = path
    if not rest:
        names[first] = new
        return
    module = names[first]
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module))
    names[first] = copy
    _put(vars(copy), tuple(rest), new)
