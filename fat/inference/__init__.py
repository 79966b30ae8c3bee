"""Use a trained model: load it together with its preprocessing, and prepare images as evaluation does."""
