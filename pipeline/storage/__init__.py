"""Reading samples: local files, remote sets, staging and the cache."""
