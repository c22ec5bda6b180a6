"""What a model costs before any hardware exists: parameters, FLOPs, memory, communication, time, energy."""

from .hardware import Hardware, catalogue, find, save_measured

__all__ = ["Hardware", "catalogue", "find", "save_measured"]
