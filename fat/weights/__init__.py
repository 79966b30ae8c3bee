"""Weights files: loading, saving, and checkpoints of the released code and other tools."""
