"""The feed process: prepare batches in a separate process, which does not compete for training's interpreter lock."""
