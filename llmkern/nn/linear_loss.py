"""LinearCrossEntropyLoss, and the loss of a model's head."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from .linear import Linear
from .loss import CrossEntropyLoss

IN_TORCH = hasattr(nn, "LinearCrossEntropyLoss")  # from 2.13 on


class _LinearCrossEntropyLoss(nn.Module):
    """What torch.nn.LinearCrossEntropyLoss holds, for versions of torch without it."""

    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None,
        reduction="mean", weight=None, ignore_index=None, label_smoothing=0.0, options=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if out_features:
            raise ValueError(f"LinearCrossEntropyLoss: out_features is {out_features}, expected ()")
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)


class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss if IN_TORCH else _LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` on llmkern's kernel: same arguments and state_dict keys.

    The logits are never whole in memory, whatever `options` says.  Losses in K dimensions
    (`out_features`) and targets that are class probabilities are computed by torch.

    Attributes:
        z_loss, softcap: as in `llmkern.ops.linear_cross_entropy`; torch has neither, so they are set
            on the module: `loss.z_loss = 1e-4`.
    """

    z_loss = 0.0
    softcap: float | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (N, D) or (D,) for class indices (N,) or ().

        Returns:
            A scalar, or with reduction="none" a tensor like `target`.
        """
        reason = self._needs_torch(target)
        if reason:
            fall_back("LinearCrossEntropyLoss", reason)
            return super().forward(input, target)
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def _needs_torch(self, target: Tensor) -> str | None:
        if not IN_TORCH or self.z_loss or self.softcap:
            return None  # torch cannot: let the op say what it does not take
        if self.out_features:
            return f"it has out_features {tuple(self.out_features)}, a loss in K dimensions"
        if target.dtype != torch.int64:
            return f"the target is {target.dtype}, not torch.int64 class indices"
        return None


def head_loss(head: nn.Module, loss: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """loss(head(hidden), target); the logits are never whole in memory where `loss` is on llmkern's kernels.

    That takes a `head` that is a plain Linear and modules without forward hooks; else the modules run one
    after the other.

    Args:
        hidden: (*, D).
        target: (*), class indices.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (head, loss))
    fuses = type(head) in (nn.Linear, Linear) and type(loss) is CrossEntropyLoss and not hooked
    if not fuses or target.dtype != torch.int64:
        return loss(head(hidden).flatten(0, -2), target.flatten())
    return ops.linear_cross_entropy(
        hidden,
        head.weight,
        target,
        linear_bias=head.bias,
        weight=loss.weight,
        reduction=loss.reduction,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
    )
