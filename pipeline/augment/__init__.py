"""Augmentation: parameters drawn as arrays from counters (`params`), pixels touched on the device (`pixels`)."""
