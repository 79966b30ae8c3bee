"""Augmentation in plain torch, on any device."""
