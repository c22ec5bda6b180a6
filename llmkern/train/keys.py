"""Settings: dataclass fields that know what they may be, from TOML, YAML or the command line."""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from ..errors import UserError

T = TypeVar("T", bound="Settings")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "two numbers"}
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def key(
    default: Any, help: str, choices: Iterable = (), least: float = -math.inf, below: float = math.inf
) -> Any:
    """A field of a settings class.

    Args:
        default: its value if none is given.
        help: one line for the user.
        choices: the values that are allowed, if not all.
        least: the smallest number that is allowed.
        below: every number that is allowed is smaller.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of frozen dataclasses whose fields are made by `key`: each value is checked, and text converted.

    Raises:
        UserError: a value that a field does not take.
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))

    @classmethod
    def make(cls: type[T], values: Mapping[str, Any], source: str) -> T:
        """The settings with these values and defaults for the rest; `source` is what an error calls them.

        Raises:
            UserError: an unknown key, with the one that is like it; a value that its field does not take.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"{source} has an unknown key {name!r}; {hint}")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def to_toml(self) -> str:
        """All fields that are not None, as TOML; `read_file` and `make` give the same settings again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # JSON's numbers, texts, truths and lists are TOML's too
        return "".join(f"{name} = {json.dumps(v)}\n" for name, v in values.items() if v is not None)


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys of a .toml, .yaml or .yml file.

    Raises:
        UserError: it is missing, not readable, or not of its format.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = _parse_yaml(text) if path.suffix in (".yaml", ".yml") else _parse_toml(text)
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read ({error.strerror}); give a TOML file") from None
    except ValueError as error:  # also UnicodeDecodeError
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "TOML"
        raise UserError(f"config {str(path)!r} is not {kind} ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} is a {type(values).__name__}, expected keys with values")
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError("a YAML config needs the library PyYAML; `pip install llmkern[data]`") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _checked(f: dataclasses.Field, value: Any) -> Any:
    kind, optional = _kind(f)
    if value is None and optional:
        return None
    result = _convert(kind, value)
    if result is None:
        raise UserError(f"{f.name} is {value!r}, expected {WORDS[kind]}")
    about = f.metadata
    if about["choices"] and result not in about["choices"]:
        near = difflib.get_close_matches(str(result), map(str, about["choices"]), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{f.name} is {result!r}, expected one of {', '.join(about['choices'])}{hint}")
    for number in result if kind is tuple else (result,) if kind in (int, float) else ():
        if number < about["least"]:
            raise UserError(f"{f.name} is {result}, expected at least {about['least']}")
        if number >= about["below"]:
            raise UserError(f"{f.name} is {result}, expected less than {about['below']}")
    return result


def _kind(f: dataclasses.Field) -> tuple[type, bool]:
    """The type of a field, and whether it may be None."""
    if get_origin(f.type) in (Union, types.UnionType):
        (kind,) = [t for t in get_args(f.type) if t is not type(None)]
        return kind, True
    return get_origin(f.type) or f.type, False


def _convert(kind: type, value: Any) -> Any:
    """The value as this kind, or None."""
    try:
        if kind is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            numbers = tuple(_convert(float, part) for part in parts)
            return numbers if len(numbers) == 2 and None not in numbers else None
        if kind is bool:
            return value if isinstance(value, bool) else TRUTHS.get(str(value).lower())
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            return None
        if kind is int and isinstance(value, float):
            return int(value) if value.is_integer() else None
        number = kind(value)
        return number if kind is str or math.isfinite(number) else None
    except (ValueError, TypeError):
        return None
