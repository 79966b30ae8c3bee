"""The subcommands `pipeline shard`, `verify`, `info`, `index` and `sample`."""
