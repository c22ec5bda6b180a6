"""What it takes to read and write one of Hugging Face's families of models."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import UserError


class Format(NamedTuple):
    """How Hugging Face keeps one family of models.

    Attributes:
        model_types: its names in config.json.
        model, config: our classes of it.
        read_config: config.json's fields to our configuration; UserError for what ours has not.
        write_config: and back, with model_type and architectures; ValueError if theirs has no such model.
        read_tensor: their name and tensor to ours; None for what is no weight of ours.
        write_tensors: their names and tensors of our model.
        layers: the field of our configuration with the number of layers.
    """

    model_types: tuple[str, ...]
    model: type[nn.Module]
    config: type
    read_config: Callable[[dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    read_tensor: Callable[[str, Tensor], tuple[str, Tensor] | None]
    write_tensors: Callable[[nn.Module], dict[str, Tensor]]
    layers: str


def expect(fields: dict[str, Any], key: str, allowed: tuple, default: Any) -> None:
    """UserError unless `fields[key]`, by default `default`, is among `allowed`."""
    value = fields.get(key, default)
    if value not in allowed:
        names = " or ".join(map(repr, allowed))
        raise UserError(f"config.json: {key} is {value!r}, expected {names}: llmkern's model has no other")


def number(fields: dict[str, Any], key: str, default: int | None = None) -> int:
    """`fields[key]`, a whole number of at least 1."""
    value = fields.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, expected a whole number of at least 1")
    return value
