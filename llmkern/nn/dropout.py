"""Dropout, with an optional residual add in the same pass."""

from torch import Tensor, nn

from .. import ops


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` on llmkern's kernel: same arguments; it stores no mask.

    Source: Srivastava et al. 2014, Dropout, JMLR 15.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Drop elements of `input` while training, and add `residual`.

        Args:
            input: any shape.
            residual: like `input`.

        Returns:
            Like `input`; with inplace=True it is `input` itself, written over.
        """
        y = ops.dropout(input, self.p, self.training, residual=residual)
        return input.copy_(y) if self.inplace and y is not input else y
