"""Create and check shard sets: WebDataset tars with a binary index and a manifest. Does not depend on torch."""
