"""Augmentation: `params` draws all random parameters on the host, `pixels` applies them on the device."""
