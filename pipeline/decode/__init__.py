"""JPEG decoders: DALI on the GPU or CPU, FFCV on the CPU, and resizing on the CPU."""
