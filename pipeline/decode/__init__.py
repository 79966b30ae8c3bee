"""Decoders of JPEGs: DALI, FFCV, and CPU resizing."""
