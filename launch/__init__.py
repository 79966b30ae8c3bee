"""The training run: recipe, engine, checkpoints, metrics."""
