"""Prepare batches in a process of their own, which does not compete with training for the interpreter lock."""
