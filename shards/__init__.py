"""Make and check shard sets: WebDataset tars with a binary index and a manifest. Knows files and JPEGs, not torch."""
