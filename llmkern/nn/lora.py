"""LoRA: a trained update of low rank beside a frozen weight.

    y = x Wᵀ + b + (α / r) dropout(x) Aᵀ Bᵀ,  A (r, D), B (D_out, r)

A begins at random and B at 0, so that at first nothing changes.  A linear gets it by another class, as in
`swap_`, and keeps its Parameters and names; merged, it is what it was before, with W + (α / r) B A.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685, sec. 4.1; on quantised weights: Dettmers et al. 2023, QLoRA,
arXiv:2305.14314, eq. 5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear, linear
from .quant import QuantLinear

MERGED = "_llmkern_lora"  # the attribute in which a merged linear keeps what unmerging needs


class LoRA:
    """The update, mixed into a class of linears.

    Attributes:
        lora_A, lora_B: Parameters (r, in_features) and (out_features, r).
        lora_scale: α / r.
        lora_dropout: probability of dropping elements of the update's input while training.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) to (*, out_features)."""
        x = F.dropout(input, self.lora_dropout, self.training) if self.lora_dropout else input
        return super().forward(input) + linear(linear(x, self.lora_A), self.lora_B) * self.lora_scale

    def extra_repr(self) -> str:
        """What stands between the brackets when it is printed."""
        return f"{super().extra_repr()}, rank={len(self.lora_A)}, scale={self.lora_scale}"


class LoRALinear(LoRA, Linear):
    """`llmkern.nn.Linear` with LoRA."""


class PlainLoRALinear(LoRA, nn.Linear):
    """`torch.nn.Linear` with LoRA."""


class QuantLoRALinear(LoRA, QuantLinear):
    """`llmkern.nn.QuantLinear` with LoRA; it cannot be merged."""


CLASSES = {Linear: LoRALinear, nn.Linear: PlainLoRALinear, QuantLinear: QuantLoRALinear}


def add_lora(module: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Give a linear of one of `CLASSES` an update, and freeze its own parameters."""
    weight = module.scales if isinstance(module, QuantLinear) else module.weight
    dtype = weight.dtype if not isinstance(module, QuantLinear) else torch.float32
    options = {"dtype": dtype, "device": weight.device}
    for p in module.parameters():
        p.requires_grad_(False)
    module.lora_A = nn.Parameter(torch.empty(rank, module.in_features, **options))
    module.lora_B = nn.Parameter(torch.zeros(module.out_features, rank, **options))
    nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))  # as torch's linears begin
    module.lora_scale, module.lora_dropout = alpha / rank, dropout
    module.__class__ = CLASSES[type(module)]


@torch.no_grad()
def merge_lora(module: LoRALinear | PlainLoRALinear) -> None:
    """Add the update to the weight, and make the module the plain linear it was.

    The weight without the update is kept, since a sum of floats cannot be taken back exactly.
    """
    a, b = module.lora_A, module.lora_B
    state = {"lora_A": a, "lora_B": b, "lora_scale": module.lora_scale, "lora_dropout": module.lora_dropout}
    kept = module.weight.detach().clone()
    module.weight += ((b.double() @ a.double()) * module.lora_scale).to(module.weight.dtype)
    setattr(module, MERGED, (type(module), state, kept))
    for name in state:
        delattr(module, name)
    module.__class__ = next(cls for cls, lora in CLASSES.items() if lora is type(module))


@torch.no_grad()
def unmerge_lora(module: nn.Linear) -> None:
    """Undo `merge_lora`: every bit of the weight, and of the update beside it, is as it was."""
    cls, state, kept = getattr(module, MERGED)
    delattr(module, MERGED)
    module.weight.copy_(kept)
    module.__class__ = cls
    for name, value in state.items():
        setattr(module, name, value)
