"""Models without memory, whose weights come from a file."""

import dataclasses
from typing import Any

import torch
from torch import nn

from ..errors import UserError

LARGEST = 2**28  # of a size in a file: products of two of them are no overflow


def on_meta(model: type[nn.Module], config: Any, source: str) -> nn.Module:
    """A model on meta, so that weights are allocated once and never drawn at random.

    Args:
        model: one of our classes.
        config: its configuration, as a file has it.
        source: what an error calls that file.

    Raises:
        UserError: there is no such model.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not 0 <= value < LARGEST:
            raise UserError(f"{source}: {field.name} is {value}, expected less than {LARGEST:,}")
    with torch.device("meta"):
        try:
            return model(config)
        except (ValueError, TypeError) as error:
            raise UserError(f"{source} describes no model: {error}") from None
