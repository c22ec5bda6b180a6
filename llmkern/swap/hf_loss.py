"""The loss of Hugging Face models: their own function with our cross_entropy, or head and loss in one op.

`model.loss_function` may be set for one model.  What is set here calls transformers' own function, so
that shifting, ignored labels and the scale under gradient accumulation (`num_items_in_batch`) stay theirs.
"""

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.children import must_call, without_hooks
from ..nn.kernel_class import ROLES, Kernel, own_class, set_kernel
from ..nn.rebound import kernel, rebind
from ..ops.dispatch import fall_back
from ..ops.linear_loss import reduced_loss
from ..ops.op import autocast
from ..report import Change, Entry, class_name
from .hf import is_model

ATTRIBUTE = "_loss_function"  # where transformers keeps a loss that was set


class KernelLoss:
    """A loss function of transformers in which cross_entropy is llmkern's.

    Args:
        own: the function.
    """

    def __init__(self, own: Callable[..., Tensor]) -> None:
        self.own, self.copy = own, rebind(own, kernel)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return KernelLoss, (self.own,)


class CausalLMKernel(Kernel):
    """A causal language model that, while it trains with labels, computes head and loss in one op.

    Its output then has no logits.
    """

    kind = "loss"

    @classmethod
    def namespace(cls, own: type[nn.Module], detail: str) -> dict[str, Any]:
        """A forward with the signature of the model's own: trainers look there which columns to keep."""

        @wraps(own.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or len(args) > 1 or kwargs.get("labels") is None or kwargs.get("logits_to_keep"):
            return super().forward(*args, **kwargs)
        if reason := must_call(head=self.get_output_embeddings()):
            fall_back(f"The loss of {own_class(self).__name__}", reason)
            return super().forward(*args, **kwargs)
        return _loss_without_logits(self, *args, **kwargs, **getattr(self, ROLES))


def plan(models: list[tuple[str, nn.Module]], fused: bool) -> Iterator[Change]:
    """Set the loss of Hugging Face models whose loss is one of transformers' cross-entropies."""
    for path, module in models:
        if not is_model(module) or is_swapped(module) or not hasattr(type(module), "loss_function"):
            continue
        own = _own_loss(module) if _calls_it(module) else None
        if own is None or rebind(own, kernel) is own:
            continue
        name = f"loss {own.__name__}"
        yield Change(
            Entry(path, name, f"{name} with llmkern's cross_entropy"),
            lambda module=module, own=own: setattr(module, ATTRIBUTE, KernelLoss(own)),
        )
        if fused:
            yield _plan_fused(path, module)


def _plan_fused(path: str, module: nn.Module) -> Change:
    roles = _why_whole = None
    try:
        with without_hooks(module):
            roles = _proved(module)
    except Exception as error:  # whatever it is, it is not a model of this kind
        _why_whole = f"it could not be tried ({type(error).__name__}: {error})"
    if roles is None or hasattr(module, ROLES):
        reason = _why_whole or "its logits are more than its head's output, or its loss more than theirs"
        return Change(Entry(path, class_name(module), None, f"loss='fused': {reason}"))
    entry = Entry(
        path, class_name(module), "llmkern.nn.CausalLMKernel",
        "head and loss are one op; no logits while training with labels",
    )  # fmt: skip
    return Change(entry, lambda: set_kernel(module, CausalLMKernel, roles))


def undo(path: str, module: nn.Module) -> Iterator[Change]:
    """Take the loss function away that was set."""
    if is_swapped(module):
        name = f"loss {module._loss_function.own.__name__}"
        entry = Entry(path, f"{name} with llmkern's cross_entropy", name)
        yield Change(entry, lambda: delattr(module, ATTRIBUTE))


def is_swapped(module: nn.Module) -> bool:
    """Whether its loss was set here."""
    return isinstance(module.__dict__.get(ATTRIBUTE), KernelLoss)


def _own_loss(model: nn.Module) -> Callable[..., Tensor] | None:
    """The model's loss, if it is transformers' own and was not set by somebody."""
    utils = sys.modules.get("transformers.loss.loss_utils")
    own = model.loss_function
    return own if utils is not None and own in utils.LOSS_MAPPING.values() else None


def _calls_it(model: nn.Module) -> bool:
    """Whether its forward reads self.loss_function."""
    forward = type(model).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "loss_function" in forward.__code__.co_names


def _loss_without_logits(
    model: nn.Module,
    *args: Any,
    labels: Tensor,
    softcap: float,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    return_dict: bool | None = None,
    logits_to_keep: Any = 0,
    **kwargs: Any,
) -> Any:
    """The model's output with its loss, and no logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = model.base_model(*args, return_dict=True, **kwargs)
    hidden, head = outputs.last_hidden_state, model.get_output_embeddings()  # (B, T, D)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # tokens before n predict n
    target = shift_labels.reshape(-1).to(hidden.device)
    hidden, weight, bias = autocast(hidden, head.weight, head.bias)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = reduced_loss(
        hidden, weight, target, bias, None, reduction, ignore_index, 0.0, 0.0, softcap, torch.float32
    )
    if num_items_in_batch is not None:
        items = num_items_in_batch
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    rest = {name: outputs[name] for name in ("hidden_states", "attentions") if name in outputs}
    out = CausalLMOutputWithPast(loss=loss, logits=None, **rest)
    plain = return_dict if return_dict is not None else getattr(model.config, "return_dict", True)
    return out if plain else out.to_tuple()


@torch.no_grad()
def _proved(model: nn.Module) -> dict[str, float] | None:
    """What `_loss_without_logits` needs, if on a few tokens it gives what the model gives."""
    head = model.get_output_embeddings()
    if type(model).__name__.find("CausalLM") < 0 and "ForCausalLM" not in str(model.loss_type):
        return None
    if must_call(head=head) or any(p.is_meta for p in model.parameters()):
        return None
    ids = torch.arange(3, 8, device=head.weight.device)[None] % head.weight.shape[0]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        softcap = _softcap(model, head, ids)
        if softcap is None:
            return None
        theirs = model(input_ids=ids, labels=ids).loss
        ours = _loss_without_logits(model, input_ids=ids, labels=ids, softcap=softcap).loss
    finally:
        for m, mode in modes.items():
            m.training = mode
    near = torch.allclose(theirs.float(), ours, rtol=1e-5 if head.weight.dtype == torch.float32 else 1e-2)
    return {"softcap": softcap} if near else None


def _softcap(model: nn.Module, head: nn.Module, ids: Tensor) -> float | None:
    """The cap of the logits, 0 for none; None if the logits are something else.

    The head's input is made large for it, so that a cap shows.
    """
    seen = []

    def enlarge(module, args):
        return (args[0] * (100 / args[0].abs().max()),)

    handles = [
        head.register_forward_pre_hook(enlarge),
        head.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    try:
        logits = model(input_ids=ids).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    (z,) = (out.float() for out in seen)
    if torch.equal(logits, z):
        return 0.0
    cap = getattr(model.config, "final_logit_softcapping", None)
    near = cap is not None and torch.allclose(logits, cap * torch.tanh(z / cap), rtol=1e-2, atol=1e-3 * cap)
    return float(cap) if near else None
