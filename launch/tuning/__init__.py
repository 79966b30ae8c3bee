"""Measure the fastest options of model and loader on this machine: `pipeline tune`."""
