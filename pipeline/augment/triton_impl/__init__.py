"""Triton kernels of augmentation. Their reference is `pipeline.augment.torch_impl`."""
