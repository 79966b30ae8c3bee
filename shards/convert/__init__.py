"""Convert a source into a shard set: `pipeline shard`."""
