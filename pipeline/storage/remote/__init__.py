"""Shard sets on a web server or in an object store: read by fsspec, staged into a cache."""
