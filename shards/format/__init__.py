"""The files of a shard set: manifest, index, tars and .beton files."""
