"""The states of all random number generators as plain values."""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def get_rng_state() -> dict[str, Any]:
    """The states of torch's generators, numpy's global one and Python's, ready for JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "torch": _pack(torch.get_rng_state()),
        "cuda": [_pack(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators; those of GPUs only where as many are there."""
    torch.set_rng_state(_unpack(state["torch"]))
    if torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_unpack(each) for each in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))


def _pack(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
