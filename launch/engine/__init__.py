"""The training step: model, optimizer, schedule, ZeRO and CUDA graphs."""
