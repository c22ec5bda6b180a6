"""Ops that are broken on purpose, for the tests of the op table: each has to go red."""

from collections.abc import Callable
from functools import wraps

import pytest
from torch import Tensor

from llmkern.ops.op import Op


def breach(monkeypatch: pytest.MonkeyPatch, op: Op, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Put change(result, first argument) in the place of what `op` gives."""
    sound = op.public

    @wraps(sound)
    def public(x, *args, **kwargs):
        return change(sound(x, *args, **kwargs), x)

    monkeypatch.setattr(op, "public", public)
