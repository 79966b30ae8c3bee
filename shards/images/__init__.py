"""Convert image files to the JPEGs of samples: formats, limits, and bit depths."""
