"""Compare the speed of training with what the arithmetic and the memory of the device allow."""

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
    """The cost of one image in training, and the peaks of one device. Rates are images per second of that device."""

    flops: int
    """Floating-point operations, forward and backward."""
    bytes: int
    """What perfectly fused blocks read from memory and write to it."""
    peaks: DevicePeaks

    @classmethod
    def of(cls, feed: Feed, engine: Engine) -> Roofline:
        """Count the recipe's model and measure this rank's device: some tenths of a second."""
        model, size = feed.recipe.model, feed.recipe.data.size
        with torch.device("meta"):
            cost = fat.count(fat.create_model(f"fat_{model.variant}", num_classes=feed.classes), size)
        passed = cost.fused_bytes(engine.input_dtype.itemsize)
        return cls(cost.training_flops, passed, device_peaks(engine.world.device, engine.precision))

    @property
    def rate(self) -> float:
        """Largest rate that the device allows."""
        return ceiling(self.flops, self.bytes, bandwidth=self.peaks.bandwidth, arithmetic=self.peaks.arithmetic)

    def mfu(self, rate: float) -> float:
        """Model FLOP utilization at a rate."""
        return rate * self.flops / self.peaks.arithmetic

    def bandwidth(self, rate: float) -> float:
        """Fraction of the copy bandwidth that fused blocks would use at a rate."""
        return rate * self.bytes / self.peaks.bandwidth
