"""Make and check shard sets: plain WebDataset tars with a binary index and a manifest. Knows files and JPEGs, not torch."""
