"""Read samples from local files and from remote sets, which are staged into a cache."""
