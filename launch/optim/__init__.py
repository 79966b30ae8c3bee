"""The optimizer: learning rates, updates and state."""
