"""One file per layout of a source, and their recognition."""
