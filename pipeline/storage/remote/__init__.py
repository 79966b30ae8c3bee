"""Shard sets on a web server or in an object store, read through fsspec and staged into a cache."""
