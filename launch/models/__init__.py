"""Models by name: FAT variants, models of timm, and functions of the user that return a model."""
