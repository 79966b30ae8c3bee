"""Compare the training throughput with the limits set by the device's arithmetic throughput and memory bandwidth."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fat.account.roofline import ceiling
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.device_peaks import DevicePeaks, device_peaks
from launch.models.cost import count
from launch.models.create import create_model


@dataclass(frozen=True)
class Roofline:
    """Cost of training on one image, and peaks of one device. Rates are in images per second and device."""

    flops: int
    """Floating-point operations of forward and backward pass per image."""
    bytes: int
    """Bytes per image that perfectly fused blocks read from device memory and write to it."""
    peaks: DevicePeaks

    @classmethod
    def of(cls, feed: Feed, engine: Engine) -> Roofline:
        """Count the operations of the recipe's model and measure this rank's device, in about a second."""
        spec, size = feed.recipe.model.spec, feed.recipe.data.size
        # A new model, because that of the engine may be sharded, captured or compiled.
        with torch.random.fork_rng(devices=[]), torch.device("meta") if spec.is_fat else nullcontext():
            cost = count(create_model(spec, num_classes=feed.classes), size)
        passed = cost.fused_bytes(engine.input_dtype.itemsize)
        return cls(cost.training_flops, passed, device_peaks(engine.world.device, engine.precision))

    @property
    def rate(self) -> float:
        """Upper bound on this device's training throughput, in images/s."""
        return ceiling(self.flops, self.bytes, bandwidth=self.peaks.bandwidth, arithmetic=self.peaks.arithmetic)

    def mfu(self, rate: float) -> float:
        """Return the model FLOPs utilization, as a fraction, at a rate in images/s."""
        return rate * self.flops / self.peaks.arithmetic

    def bandwidth(self, rate: float) -> float:
        """Return the fraction of the copy bandwidth that perfectly fused blocks use at a rate in images/s."""
        return rate * self.bytes / self.peaks.bandwidth
