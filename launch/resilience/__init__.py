"""Handling of preemption, hangs, unsuitable nodes and numerical failures."""
