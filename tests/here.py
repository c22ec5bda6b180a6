"""What the machine has that runs the tests."""

import importlib.util

import torch

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
