"""`pipeline bench`: throughput of the loader alone, of the training step alone, and of both together."""
