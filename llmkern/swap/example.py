"""Which implementation runs in each module, for an example."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..ops import OPS
from ..ops.dispatch import choose
from ..ops.explain import Choice, Listen
from ..ops.op import Op
from ..report import Entry, Report

FORWARD = {op.fwd: op for op in OPS.values()}


def call(model: nn.Module, batch: Any) -> Any:
    """model(batch): a dict is keyword arguments, a tuple or list arguments, anything else the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def tell_what_runs(model: nn.Module, report: Report, batch: Any) -> Report:
    """The report, with what ran in each module of it while the model ran the batch once."""
    changed = {model.get_submodule(e.path): e.path for e in report.changed}
    ran: dict[str, dict[str, None]] = {path: {} for path in changed.values()}
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    grad = torch.enable_grad() if model.training else torch.no_grad()
    with torch.random.fork_rng(devices), grad, _inside(changed) as stack, _Watch(stack, ran, model.training):
        call(model, batch)
    entries = [
        replace(e, runs="; ".join(_of(e, ran.get(e.path, ()))) if e.now else "") for e in report.entries
    ]
    return Report(entries, report.watch)


def _of(entry: Entry, sentences: Iterable[str]) -> list[str]:
    """Those of the sentences that are about this entry: attention and loss have entries of their own."""
    settings = {"attention ": "attention", "loss ": "cross_entropy"}
    about = next((op for setting, op in settings.items() if entry.now.startswith(setting)), "")
    return [sentence for sentence in sentences if about in sentence]


@contextmanager
def _inside(paths: dict[nn.Module, str]):
    """A list that holds, inside the block, the paths of the modules that are running."""
    stack: list[str] = []

    def enter(module, args):
        if module in paths:
            stack.append(paths[module])

    def leave(module, args, out):
        if module in paths:
            stack.pop()

    handles = hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):
    """Notes what runs each op of llmkern, under the path of the innermost module of the report."""

    def __init__(self, stack: list[str], ran: dict[str, dict[str, None]], trained: bool) -> None:
        super().__init__()
        self.stack, self.ran, self.trained = stack, ran, trained

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in FORWARD and self.stack:
            self.ran[self.stack[-1]][_sentence(FORWARD[func], args, self.trained)] = None
        return func(*args, **(kwargs or {}))


def _sentence(op: Op, args: tuple, trained: bool) -> str:
    """ "attention: cpp (avx2)", with what differs in backward, and why it is the reference."""
    backend, _, reason = choose(op, "fwd", args)
    forward = Choice(backend, reason)
    backward = _backward(op, args) if trained and op.gradients else None
    if backward is None or backward == forward:
        return f"{op.name}: {_short(forward)}"
    return f"{op.name}: {_short(forward)}, backward {_short(backward)}"


def _backward(op: Op, args: tuple) -> Choice | None:
    """What would run for the gradient, found out on fake tensors; None if none is needed."""
    fake = FakeTensorMode()
    args = tree_map_only(Tensor, lambda t: fake.from_tensor(t.detach()).requires_grad_(t.requires_grad), args)
    with fake, torch.enable_grad(), Listen(op) as heard:
        out = op.apply(*args)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return heard.choice("bwd")


def _short(choice: Choice) -> str:
    text = str(choice).removeprefix("on the ")
    return text.replace("C++ kernel", "cpp").replace(" kernel", "").replace("PyTorch ", "")
