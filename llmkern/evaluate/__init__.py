"""How good a model is: of the language, and of classes."""

from .classes import Scores, predict, score
from .language import Predictability, predictability

__all__ = ["Predictability", "Scores", "predict", "predictability", "score"]
