"""Triton kernels and their launchers, one file for each op family; installed as `llmkern.kernels`."""
