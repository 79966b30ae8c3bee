"""Measure loader and training step, alone and together: `pipeline bench`."""
