"""A step of generation as a module."""

from torch import Tensor, nn

from ..models import GPT, Llama


class DecodeStep(nn.Module):
    """One new token for each sequence of one of our models whose cache holds `length` tokens."""

    def __init__(self, model: GPT | Llama, batch: int, length: int) -> None:
        super().__init__()
        self.model = model
        self.length = length
        self.caches = {batch: model.new_caches(batch, length + 1)}

    def kv_cache(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return tuple(t for caches in self.caches.values() for t in (caches.k, caches.v))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1) token ids to (B, 1, V) logits."""
        if len(tokens) not in self.caches:
            self.caches = {len(tokens): self.model.new_caches(len(tokens), self.length + 1)}
        caches = self.caches[len(tokens)]
        caches.lengths.fill_(self.length)
        return self.model.lm_head(self.model.hidden(tokens, caches))
