"""From a shard set to batches on the device: plan, reader, decoding, augmentation."""
