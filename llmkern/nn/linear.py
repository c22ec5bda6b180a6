"""The linear layer: Linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` on llmkern's kernel for CPUs: same arguments, parameters and state_dict keys.

    On a GPU torch computes it: its matrix product alone is at the limit there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) to (*, out_features)."""
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.linear` on a CPU, torch's elsewhere."""
    return (ops.linear if input.device.type == "cpu" else F.linear)(input, weight, bias)
