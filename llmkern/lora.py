"""LoRA on the linears of somebody's model, in place, and off again."""

from collections.abc import Callable

from torch import Tensor, nn

from .nn.children import hooked
from .nn.lora import CLASSES, MERGED, LoRA, QuantLoRALinear, add_lora, merge_lora, unmerge_lora
from .report import Entry, Report

HEADS = ("lm_head", "score", "classifier")


def lora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Freeze a model, and give its linears trained updates of low rank, in place.

        llmkern.lora_(model)
        optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
        ...
        llmkern.merge_lora_(model)  # a model without LoRA, as fast as before

    Args:
        model: any module; also one with `swap_`, or quantised.
        rank: r, at least 1.
        alpha: the update is multiplied by alpha / rank.
        dropout: of the update's input, while training.
        filter_fn: called with (module, path); only linears for which it is true are taken.  By default all
            but heads, modules called lm_head, score or classifier.

    Returns:
        A Report, to print: every linear taken, and every one left alone with the reason.

    Raises:
        ValueError: a rank below 1, a dropout out of [0, 1), or a model without a linear to take.
    """
    if rank < 1:
        raise ValueError(f"lora_: rank is {rank}, expected 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_: dropout is {dropout}, expected 0 or more, and less than 1")
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError("lora_: the model has LoRA already; merge_lora_ it first")
    wanted = filter_fn or (lambda module, path: path.rsplit(".", 1)[-1] not in HEADS)
    report, taken = Report(), []
    for path, module, parent in _linears(model):
        if not wanted(module, path):
            continue
        reason = _why_left(model, module, parent)
        if reason is None:
            taken.append(module)
        now = None if reason else f"llmkern.nn.lora.{CLASSES[type(module)].__name__}"
        report.entries.append(Entry(path, type(module).__name__, now, reason or ""))
    if not taken:
        reasons = "; ".join(f"{e.path}: {e.note}" for e in report.left) or "it has no linear to take"
        raise ValueError(f"lora_: nothing in {type(model).__name__} can have LoRA: {reasons}")
    model.requires_grad_(False)
    for module in taken:
        add_lora(module, rank, alpha, dropout)
    return report


def merge_lora_(model: nn.Module) -> None:
    """Add every update to its weight, in place: the model is what it was before `lora_`, but for values.

    Raises:
        ValueError: a weight in 8 or 4 bits, which the update would not fit into; then nothing is changed.
    """
    found = [module for module in model.modules() if isinstance(module, LoRA)]
    if any(isinstance(module, QuantLoRALinear) for module in found):
        raise ValueError("merge_lora_: the model has quantised weights, expected floating-point ones")
    for module in found:
        merge_lora(module)


def unmerge_lora_(model: nn.Module) -> None:
    """Undo `merge_lora_`, bit for bit, in place."""
    for module in model.modules():
        if hasattr(module, MERGED):
            unmerge_lora(module)


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all updates: the part of the state_dict that `lora_` added."""
    return {
        name: t for name, t in model.state_dict().items() if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")
    }


def _linears(model: nn.Module):
    """(path, linear, its parent) of everything that may have LoRA, each module once."""
    seen = set()
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            if isinstance(child, (nn.Linear, *CLASSES)) and child not in seen:
                seen.add(child)
                yield (f"{path}.{name}" if path else name), child, parent


def _why_left(model: nn.Module, module: nn.Module, parent: nn.Module) -> str | None:
    if type(module) not in CLASSES:
        return f"a {type(module).__name__}; its parent may read its weight without calling it"
    if type(parent) is nn.TransformerEncoderLayer:
        return "torch's TransformerEncoderLayer reads its weight; swap_ the layer first"
    if hooked(module):
        return "it has hooks or a forward of its own"
    weight = getattr(module, "weight", None)
    if weight is not None and sum(p is weight for m in model.modules() for p in m._parameters.values()) > 1:
        return "its weight is shared with another module, which the update would not reach"
    return None
