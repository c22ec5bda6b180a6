"""What every decoder is made of, by one set of names: embeddings, layers, last norm, head."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import GPT, Llama


class Spine(NamedTuple):
    """The parts of a decoder.

    Attributes:
        parts: the ModuleDict that holds them.
        tokens, positions: names in it of the embeddings; positions may be absent.
        layers, norm: names in it of the list of layers and the norm behind it.
        embed: (B, T) token ids to (B, T, C).
        step: (layer, x) to x.
    """

    parts: nn.ModuleDict
    tokens: str
    positions: str | None
    layers: str
    norm: str
    embed: Callable[[Tensor], Tensor]
    step: Callable[[nn.Module, Tensor], Tensor]


def spine_of(model: nn.Module) -> Spine:
    """The parts of one of our decoders.

    Raises:
        UserError: it is none.
    """
    if isinstance(model, GPT):
        t = model.transformer

        def embed(idx: Tensor) -> Tensor:
            return t.drop(t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device)))

        return Spine(t, "wte", "wpe", "h", "ln_f", embed, lambda layer, x: layer(x))
    if isinstance(model, Llama):
        m = model.model
        return Spine(
            m, "embed_tokens", None, "layers", "norm", lambda idx: m.embed_tokens(idx),
            lambda layer, x: layer(x, model.rotary),
        )  # fmt: skip
    raise UserError(
        f"parallel: a {type(model).__name__} takes dp and fsdp alone; tp, pp and cp take GPT and Llama"
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: the layers."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
