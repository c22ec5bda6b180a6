"""llmkern: get a PyTorch GPT past the hardware wall it hits."""

__version__ = "0.1.0"
