"""Embedding, with the rows of a position table added in the same pass."""

from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` on llmkern's kernel: same arguments, parameter and state_dict keys.

    With `max_norm`, `scale_grad_by_freq` or `sparse` torch computes it.
    """

    def forward(
        self, input: Tensor, position_weight: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The row of the weight for each index.

        Args:
            input: (*, length) int64 or int32.
            position_weight: (positions, embedding_dim), of which the row of its position is added to each.
            position_ids: int64 or int32, of a shape that expands to that of `input`; None is 0, 1, 2, ...
                along the last dimension.

        Returns:
            (*, length, embedding_dim).
        """
        options = ("max_norm", "scale_grad_by_freq", "sparse")
        used = [name for name in options if getattr(self, name) not in (None, False)]
        if used and position_weight is None:
            fall_back("Embedding", f"it has the option {used[0]}")
            return super().forward(input)
        if used:
            raise ValueError(f"Embedding: position_weight cannot be added with the option {used[0]}")
        return ops.embedding(input, self.weight, position_weight, position_ids, self.padding_idx)
