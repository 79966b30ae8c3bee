"""Count parameters, operations and bytes of a model."""
