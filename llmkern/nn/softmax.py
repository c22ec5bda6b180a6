"""Softmax and LogSoftmax."""

from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back


class Softmax(nn.Softmax):
    """`torch.nn.Softmax` on llmkern's kernel: same arguments (without `dim`, torch guesses it)."""

    def forward(self, input: Tensor) -> Tensor:
        """Like `input`; slices along `dim` sum to 1."""
        if self.dim is None:
            fall_back("Softmax", "it has no dim")
            return super().forward(input)
        return ops.softmax(input, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on llmkern's kernel: same arguments (without `dim`, torch guesses it)."""

    def forward(self, input: Tensor) -> Tensor:
        """Like `input`; exp of it sums to 1 along `dim`."""
        if self.dim is None:
            fall_back("LogSoftmax", "it has no dim")
            return super().forward(input)
        return ops.log_softmax(input, self.dim)
