"""The input pipeline: from a shard set to augmented batches on the device."""
