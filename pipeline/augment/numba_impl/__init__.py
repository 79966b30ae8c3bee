"""Augmentation on the CPU, compiled by Numba: a few samples at a time, from 8-bit pixels to the finished values."""
