"""Augmentation in plain PyTorch, on any device: the reference of the Triton kernels and their fallback."""
