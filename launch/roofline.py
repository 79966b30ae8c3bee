"""Compare the throughput of training with the limits that arithmetic and memory of the device set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fat
from fat.account.roofline import ceiling
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.device_peaks import DevicePeaks, device_peaks


@dataclass(frozen=True)
class Roofline:
    """Cost of training on one image, and peaks of one device. Rates are in images per second and device."""

    flops: int
    """Floating-point operations of forward and backward."""
    bytes: int
    """Bytes that perfectly fused blocks read from device memory and write to it."""
    peaks: DevicePeaks

    @classmethod
    def of(cls, feed: Feed, engine: Engine) -> Roofline:
        """Count the operations of the recipe's model and measure this rank's device, in less than a second."""
        model, size = feed.recipe.model, feed.recipe.data.size
        with torch.device("meta"):
            cost = fat.count(fat.create_model(f"fat_{model.variant}", num_classes=feed.classes), size)
        passed = cost.fused_bytes(engine.input_dtype.itemsize)
        return cls(cost.training_flops, passed, device_peaks(engine.world.device, engine.precision))

    @property
    def rate(self) -> float:
        """Upper bound on the rate of this device."""
        return ceiling(self.flops, self.bytes, bandwidth=self.peaks.bandwidth, arithmetic=self.peaks.arithmetic)

    def mfu(self, rate: float) -> float:
        """Return the model FLOPs utilization at a rate, as a fraction."""
        return rate * self.flops / self.peaks.arithmetic

    def bandwidth(self, rate: float) -> float:
        """Return the fraction of the copy bandwidth that perfectly fused blocks use at a rate."""
        return rate * self.bytes / self.peaks.bandwidth
