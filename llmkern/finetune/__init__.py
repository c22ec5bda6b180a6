"""Training a model on: for classes of texts, or for other texts; all of it, or with LoRA."""

from .fit import Epoch, balanced_weights, fit

__all__ = ["Epoch", "balanced_weights", "fit"]
