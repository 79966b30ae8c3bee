"""What augmentation costs per image: our batched torch operations against PIL's, the same draws on the same photos.

One run, interleaved pairs (ours, PIL's, ours, ...), medians; both single-threaded unless --threads says otherwise.
PIL's side does what a DataLoader worker does per image after decoding: RandAugment by PIL, then tensor, normalise and
erase by torch. Our side takes a batch on --device, where the images already are. Mixing and the draws are timed on
their own, and so is the bare memory of the result, which a CPU must fault in.

    python benchmarks/augment.py --out benchmarks/results/augment.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image

from pipeline.augment import params as draws
from pipeline.augment import reference
from pipeline.augment.mix import mix
from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import AugmentRecipe, augment_recipe

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.batch, args.size, args.pairs, torch.device(args.device))
    report = {
        "machine": machine(args.device),
        "settings": {"batch": args.batch, "size": args.size, "pairs": args.pairs, "threads": args.threads},
        "unit": "microseconds per image",
        "operations": {op.title: bench.operation(op) for op in Op},
        "recipes": {name: bench.recipe(name) for name in ("fat", "light")},
        "our own": bench.ours_alone(),
    }
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


class Bench:
    """Times both sides on the same photos and draws."""

    def __init__(self, batch: int, size: int, pairs: int, device: torch.device) -> None:
        self.batch, self.size, self.pairs, self.device = batch, size, pairs, device
        photos = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]
        self.photos = [photos[i % len(photos)].resize((size, size)) for i in range(batch)]
        self.images = torch.from_numpy(np.stack([np.asarray(photo) for photo in self.photos])).to(device)

    def operation(self, op: Op) -> dict[str, float]:
        """One operation on every image, 8-bit pixels to 8-bit pixels."""
        recipe = augment_recipe("fat", size=self.size, erase=0.0)
        params = self._params(recipe)
        magnitude, sign = np.full(self.batch, 9.0), np.where(np.arange(self.batch) % 2, 1.0, -1.0)
        ops = np.full(self.batch, op)
        argument = draws.arguments(ops, magnitude, sign, increasing=True)
        params = SampleParams(
            **vars(params)
            | {
                "ops": ops[:, None],
                "applied": np.ones((self.batch, 1), dtype=bool),
                "arguments": argument[:, None],
                "magnitudes": magnitude[:, None],
            }
        )
        augment = BatchAugment(recipe, self.device)

        def pil() -> None:
            for i, photo in enumerate(self.photos):
                reference.rand_augment(photo, recipe, params, i)

        return self._compare(lambda: augment.operate(self.images, params), pil)

    def recipe(self, name: str) -> dict[str, float]:
        """Everything between the decoded crop and the tensor, mixing aside."""
        recipe = augment_recipe(name, size=self.size)
        params = self._params(recipe)
        augment = BatchAugment(recipe, self.device)

        def pil() -> None:
            torch.stack([pil_sample(photo, recipe, params, i) for i, photo in enumerate(self.photos)])

        return self._compare(lambda: augment(self.images, params), pil)

    def ours_alone(self) -> dict[str, float]:
        """The parts that have no counterpart per image."""
        recipe = augment_recipe("fat", size=self.size)
        samples = BatchAugment(recipe, self.device)(self.images, self._params(recipe))
        mixing = draws.mix_params(recipe, seed=0, step=0, lanes=np.arange(self.batch) // 2)
        lanes = np.arange(self.batch) // 16
        parts: dict[str, Callable[[], Any]] = {
            "mix": lambda: mix(samples, mixing),
            "draws of samples": lambda: self._params(recipe),
            "draws of mixing": lambda: draws.mix_params(recipe, seed=0, step=0, lanes=lanes),
            "memory of a float32 batch": lambda: torch.empty_like(samples).zero_(),
        }
        return {name: statistics.median(self._time(part) for _ in range(self.pairs)) for name, part in parts.items()}

    def _compare(self, ours: Callable[[], Any], pil: Callable[[], Any]) -> dict[str, float]:
        ours(), pil()  # warm
        times = [(self._time(ours), self._time(pil)) for _ in range(self.pairs)]
        return {
            "ours": statistics.median(mine for mine, _ in times),
            "pil": statistics.median(theirs for _, theirs in times),
            "ours over pil": statistics.median(mine / theirs for mine, theirs in times),
        }

    def _time(self, work: Callable[[], Any]) -> float:
        """Microseconds per image."""
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.batch * 1e6

    def _params(self, recipe: AugmentRecipe) -> SampleParams:
        ids, sides = np.arange(self.batch), np.full(self.batch, self.size)
        return draws.draw(recipe, seed=0, epoch=0, ids=ids, heights=sides, widths=sides)


def pil_sample(photo: Image.Image, recipe: AugmentRecipe, params: SampleParams, i: int) -> torch.Tensor:
    """A DataLoader worker's share after decoding."""
    pixels = torch.from_numpy(np.array(reference.rand_augment(photo, recipe, params, i)))
    values = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    values.sub_(torch.tensor(recipe.mean)[:, None, None]).div_(torch.tensor(recipe.std)[:, None, None])
    y, x, height, width = params.erase_boxes[i].tolist()
    values[:, y : y + height, x : x + width] = torch.empty(3, height, width).normal_()
    return values


def machine(device: str) -> dict[str, Any]:
    """Where the figures come from."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def show(report: dict[str, Any]) -> None:
    print(json.dumps({key: report[key] for key in ("machine", "settings", "unit")}))
    print(f"{'':26}{'ours':>8}{'PIL':>8}{'ratio':>8}")
    for name, row in (report["operations"] | report["recipes"]).items():
        print(f"{name:26}{row['ours']:8.0f}{row['pil']:8.0f}{row['ours over pil']:8.2f}")
    for name, value in report["our own"].items():
        print(f"{name:26}{value:8.0f}")


if __name__ == "__main__":
    main()
