"""Measure what fat/small_maps.py saves in a training step on CPUs: forward, backward and optimizer, in fp32.

    python benchmarks/small_maps.py [--variant b0] [--sizes 32 64 96] [--batch 64] [--rounds 5] [--steps 4]
                                    [--out FILE.json]

Both ways alternate in one process. Use an otherwise idle machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

import fat
from benchmarks.interleaved import machine, medians, ratio, run_interleaved
from fat import small_maps
from shards.files.durable import durable_write

WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "with": nullcontext,
    "without": partial(mock.patch.object, small_maps, "_on_cpu", lambda _: False),
}


@dataclass(frozen=True)
class Options:
    """Measure training steps with small images on CPUs."""

    variant: str = "b0"
    sizes: tuple[int, ...] = (32, 64, 96)
    batch: int = 64
    rounds: int = 5
    steps: int = 4
    out: Path | None = None


def train(options: Options, size: int, way: str) -> Iterator[int]:
    """Train on random images, and yield the images of each step."""
    torch.manual_seed(0)
    model = fat.create_model(f"fat_{options.variant}", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(options.batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,))
    while True:
        with WAYS[way]():
            torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield options.batch


def main() -> int:
    options = tyro.cli(Options)
    results = {}
    for size in options.sizes:
        makers = {way: partial(train, options, size, way) for way in WAYS}
        units = {"units": options.steps * options.batch, "warm_up": 2 * options.batch}
        turns = run_interleaved(makers, rounds=options.rounds, **units)
        results[size] = medians(turns) | {"ratio": ratio(turns, "with", "without")}
        print(f"{size} pixels: {results[size]['ratio']['rate']:.2f} times the images/s")
    if options.out:
        content = {"machine": machine(torch.device("cpu")), "variant": options.variant, "batch": options.batch}
        content["results"] = results
        durable_write(options.out, (json.dumps(content, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
