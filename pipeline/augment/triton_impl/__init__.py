"""Augmentation as Triton kernels."""
