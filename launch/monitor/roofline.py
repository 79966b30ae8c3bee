"""Compare the training throughput with the limits set by the device's arithmetic throughput and memory bandwidth."""

from __future__ import annotations

from collections.abc import Iterable
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
        """Count the operations of the recipe's model at `size`, and measure this rank's device, in about a second."""
        size = feed.recipe.data.size
        return cls.by_size(feed, engine, [size])[size]

    @classmethod
    def by_size(cls, feed: Feed, engine: Engine, sizes: Iterable[int]) -> dict[int, Roofline]:
        """Count the operations of the recipe's model at several image sizes, and measure this rank's device once."""
        spec = feed.recipe.model.spec
        # A new model, because that of the engine may be sharded, captured or compiled.
        with torch.random.fork_rng(devices=[]), torch.device("meta") if spec.is_fat else nullcontext():
            model = create_model(spec, num_classes=feed.classes)
            costs = {size: count(model, size) for size in sizes}
        itemsize, peaks = engine.input_dtype.itemsize, device_peaks(engine.world.device, engine.precision)
        return {size: cls(cost.training_flops, cost.fused_bytes(itemsize), peaks) for size, cost in costs.items()}

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
