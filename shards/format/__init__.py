"""What a shard set is on disk: manifest, index, tars and .beton files."""
