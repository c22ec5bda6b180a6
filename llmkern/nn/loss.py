"""CrossEntropyLoss."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on llmkern's kernel: same arguments and state_dict keys.

    Targets that are class probabilities are computed by torch.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C), (C,) or (N, C, d1, ...) for class indices (N,), () or (N, d1, ...).

        Returns:
            A scalar, or with reduction="none" a tensor like `target`.
        """
        if target.dtype != torch.int64:
            fall_back("CrossEntropyLoss", f"the target is {target.dtype}, not torch.int64 class indices")
            return super().forward(input, target)
        return ops.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )
