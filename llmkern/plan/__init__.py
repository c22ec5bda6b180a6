"""What a model costs before any hardware exists: parameters, FLOPs, memory, communication, time, energy."""

from .api import Plan, Run, plan
from .command import add_arguments, run
from .hardware import Hardware, catalogue, find, save_measured
from .model import Model
from .search import Candidate
from .strategy import RECIPES, Recipe, Strategy

__all__ = [
    "RECIPES",
    "Candidate",
    "Hardware",
    "Model",
    "Plan",
    "Recipe",
    "Run",
    "Strategy",
    "add_arguments",
    "catalogue",
    "find",
    "plan",
    "run",
    "save_measured",
]
