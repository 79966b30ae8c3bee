"""The run folder: checkpoints, metrics, status and curves."""
