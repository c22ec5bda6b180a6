"""What every decoder is made of, by one set of names: embeddings, layers, last norm, head."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import UserError
from ..models import GPT, Llama


class Spine(NamedTuple):
    """The parts of a decoder.

    Attributes:
        parts: the ModuleDict that holds them.
        tokens, positions: names in it of the embeddings; positions may be absent.
        layers, norm: names in it of the list of layers and the norm behind it.
        attention: name in a layer of its attention; the feed-forward is "mlp".
        embed: (token embeddings, positions) to x, both (B, T, C) but positions (T,).
        step: (layer, x, positions) to x.
    """

    parts: nn.ModuleDict
    tokens: str
    positions: str | None
    layers: str
    norm: str
    attention: str
    embed: Callable[[Tensor, Tensor], Tensor]
    step: Callable[[nn.Module, Tensor, Tensor], Tensor]


def spine_of(model: nn.Module) -> Spine:
    """The parts of one of our decoders.

    Raises:
        UserError: it is none.
    """
    if isinstance(model, GPT):
        t = model.transformer
        return Spine(
            t, "wte", "wpe", "h", "ln_f", "attn",
            embed=lambda x, positions: t.drop(x + t.wpe(positions)),
            step=lambda layer, x, positions: layer(x),
        )  # fmt: skip
    if isinstance(model, Llama):
        return Spine(
            model.model, "embed_tokens", None, "layers", "norm", "self_attn",
            embed=lambda x, positions: x,
            step=lambda layer, x, positions: layer(x, lambda q, k: model.rotary(q, k, positions)),
        )  # fmt: skip
    raise UserError(
        f"parallel: a {type(model).__name__} takes dp and fsdp alone; tp, pp and cp take GPT and Llama"
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: the layers."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
