"""What every causal language model here does: logits, loss, and generation with a cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import KVCache, KVCaches
from ..nn.linear_loss import head_loss
from .decoder import decoder_of


class CausalLM(nn.Module):
    """A decoder that gives the logits of the next token.  Subclasses set the attributes and give `hidden`.

    Attributes:
        config: has vocab_size and block_size.
        lm_head: from the last hidden states, (*, C), to logits, (*, V).
        loss: of logits (N, V) and targets (N,).
    """

    def hidden(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """(B, T) token ids to the last hidden states, (B, T, C).

        With `caches`, one a block as `new_caches` makes them, the tokens follow those in the caches.
        """
        raise NotImplementedError

    def new_caches(self, batch: int, max_length: int, **options: object) -> KVCaches:
        """An empty `KVCache` for each block; options dtype and page_size, by default the model's dtype."""
        raise NotImplementedError

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the next token at every position, and their loss.

        Args:
            idx: (B, T) token ids; T up to block_size.
            targets: (B, T) the tokens to predict; -100 is ignored.
            return_logits: False, with targets, gives the loss alone: on llmkern's kernels the logits are
                then never whole in memory, which is what training wants.

        Returns:
            (logits, loss): (B, T, V) or None, and the mean cross-entropy in nats, or None without targets.

        Raises:
            ValueError: idx of another shape or dtype, or too long; or neither logits nor loss wanted.
        """
        if not return_logits and targets is None:
            raise ValueError(
                f"{type(self).__name__}: return_logits is False and targets is None, expected one of them"
            )
        hidden = self.hidden(idx)
        if not return_logits:
            return None, head_loss(self.lm_head, self.loss, hidden, targets)
        logits = self.lm_head(hidden)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, self.loss(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample tokens one after another; call `eval()` first if the model has dropout.

        Keys and values of what was seen are kept in caches until block_size is full.

        Args:
            idx: (B, T) the prompt, T at least 1; what lies more than block_size back is not seen.
            max_new_tokens: how many to append.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample from the k most likely tokens only.
            generator: source of randomness, on the device of `idx`.

        Returns:
            (B, T + max_new_tokens) token ids.

        Raises:
            ValueError: a negative temperature, top_k below 1, or an empty prompt.
        """
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected 1 or more, or None")
        if idx.numel() == 0:
            raise ValueError(f"generate: idx has shape {tuple(idx.shape)}, expected at least one token")
        caches, new = self._caches_to_generate(idx, max_new_tokens), idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:  # all positions move
                caches, new = None, idx[:, -self.config.block_size :]
            logits = self.next_logits(new, caches)  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                token = _sample(logits / temperature, top_k, generator)
            token = token.to(idx.dtype)
            idx = torch.cat((idx, token), dim=1)
            new = idx if caches is None else token
        return idx

    def next_logits(self, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits of the token after (B, T) ids, which follow those in `caches`; (B, V) float32.

        One token a sequence is a single C++ call on a CPU, for which weights in 4 and 8 bits are laid out
        anew once; changes of weights are seen from the next call with more tokens on.
        """
        if isinstance(caches, KVCaches) and not torch.is_grad_enabled():
            decoder = decoder_of(self, caches) if idx.shape[1] == 1 else caches.memo.clear()
            if decoder is not None:
                return decoder.step(idx[:, 0], caches)
        return self.lm_head(self.hidden(idx, caches)[:, -1]).float()

    def _caches_to_generate(self, idx: Tensor, max_new_tokens: int) -> list[KVCache] | None:
        """Caches for the prompt and the new tokens; None where the model cannot use them now."""
        return self.new_caches(len(idx), min(idx.shape[1] + max_new_tokens, self.config.block_size))

    def _check(self, idx: Tensor) -> None:
        name, most = type(self).__name__, self.config.block_size
        if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name}: idx is {idx.dtype} of shape {tuple(idx.shape)}, expected integers (batch, length)"
            )
        if idx.shape[1] > most:
            raise ValueError(
                f"{name}: idx has {idx.shape[1]} tokens, expected at most block_size {most}; crop it"
            )

    def num_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


def _sample(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B, 1) tokens."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
