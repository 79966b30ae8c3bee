"""Use trained models: classify images, and export models for other programs."""
