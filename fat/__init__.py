"""The FAT family (Fully Adaptive Transformer, arXiv 2306.00396)."""
