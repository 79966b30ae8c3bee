"""Figures that are used where nothing was measured: those of an H200, ImageNet-1K, and assumptions about networks.

h200.json has rounded figures of benchmarks/results/gpu.json, which is not part of the installed package;
tests/unit/test_capacity_reference.py compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1K."""
IMAGENET_BYTES = 147_897_477_120 / IMAGENET_IMAGES
"""Bytes of a stored image: those of ILSVRC2012_img_train.tar, divided by its images."""
CLASSES = 1000

NETWORK = 400e9 / 8
"""Bytes/s of a node's network: one adapter of 400 Gbit/s."""
GPU_NETWORK = 450e9
"""Bytes/s of a GPU's links: half of NVLink's 900 GB/s in both directions (NVIDIA's data sheet of the H200)."""
# Latencies that NCCL itself assumes for trees with the protocol LL (src/graph/tuning.cc: baseLat, hwLat).
BASE_LATENCY, GPU_LATENCY, NETWORK_LATENCY = 6.8e-6, 0.6e-6, 5e-6
TCP_LATENCY = 50e-6
"""Latency of a message with TCP between processes on CPUs: its order of magnitude on Ethernet."""

MEASURED_IN = "NVIDIA H200, benchmarks/results/gpu.json"


@dataclass(frozen=True)
class Reference:
    """Figures of one GPU."""

    device: str
    size: int
    """Side of the images in pixels."""
    batch: int
    images_per_second: Mapping[str, float]
    """Training step alone, by model: part `step` or `bench`, CUDA graphs, the fastest."""
    training_images_per_second: Mapping[str, float]
    """Training while batches are ready, by model: `both` of part `bench`; models without this part are missing."""
    launch_model: str
    """Model with which the launching time was measured."""
    launch_seconds: float
    """Time in which the host launches a step with CUDA graphs: part `bench-b3`, with the loader."""
    jitter: float
    """Standard deviation of the step times relative to their mean: part `bench-b3`, model alone."""
    loader_images_per_second: float
    """Part `bench-b3`, loader alone, with the JPEG engine."""
    loader_cpu_seconds: float
    """CPU seconds per image: benchmarks/cores_per_gpu.py, JPEG engine."""
    cores: int
    """CPU cores per GPU of that machine."""

    def step_rate(self, model: str) -> float:
        """Return the images/s of a training step as `Bench.step_seconds` does: with what the loader takes from it.

        Of a model whose training was not measured, it is the rate of the model alone.
        """
        alone = self.images_per_second[model]
        return min(alone, self.training_images_per_second.get(model, alone))


@cache
def h200() -> Reference:
    return Reference(**json.loads(Path(__file__).with_name("h200.json").read_text(encoding="utf-8")))
