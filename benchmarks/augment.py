"""Compare the cost of augmentation per image: our compiled functions, PyTorch and PIL, with the same random draws.

The three are timed alternately in one run (ours, PyTorch, PIL, ours, ...), and medians are reported. All use a single
thread unless --threads specifies more. Ours are the functions that Numba compiles on a CPU
(pipeline/augment/numba_impl/) and the Triton kernels on a GPU. The PIL side does what a DataLoader worker does with
each decoded image: RandAugment in PIL, then conversion to a tensor, normalization and erasing in PyTorch. Ours and
PyTorch augment a batch that is already on --device; PyTorch mixes it in a separate step. On a CPU, the time is CPU time
of the process, which depends less on other programs. Timed separately: the random draws.

On a GPU, the Triton kernels (pipeline/augment/triton_impl/randaugment.py, finishing.py) are also compared with PyTorch
on a batch of a training step: number of launches, elapsed time, device time, RandAugment's memory traffic relative to
the bandwidth of a copy, and the device time as a fraction of a FAT-B0 training step (goal: at most 3 %).

Runs on any machine; use an otherwise idle one, and a GPU to measure the kernels.

    python benchmarks/augment.py --out benchmarks/results/augment.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from launch.machine.provenance import cpu_name
from pipeline.augment import params as draws
from pipeline.augment import reference
from pipeline.augment.ops import Op
from pipeline.augment.params import MixParams, SampleParams
from pipeline.augment.pixels import BatchAugment
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.augment.triton_impl import passes
from pipeline.augment.workers import Workers
from shards.cores import cores

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step-batch", type=int, default=256, help="batch size of the training step, on a GPU")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.batch, args.size, args.pairs, torch.device(args.device))
    report: dict[str, Any] = {
        "machine": machine(args.device),
        "settings": {"batch": args.batch, "size": args.size, "pairs": args.pairs, "threads": args.threads},
        "unit": "microseconds per image",
        "operations": {op.title: bench.operation(op) for op in Op},
        "recipes": {name: bench.recipe(name) for name in ("fat", "light")} | {"fat with mixing": bench.mixed()},
        "draws": bench.random_draws(),
    }
    if args.device.startswith("cuda"):
        on_gpu = OnGpu(Bench(args.step_batch, args.size, args.pairs, torch.device(args.device)))
        report["on a GPU"] = on_gpu.report()
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


class Bench:
    """Times both implementations with the same photos and random draws."""

    def __init__(self, batch: int, size: int, pairs: int, device: torch.device) -> None:
        self.batch, self.size, self.pairs, self.device = batch, size, pairs, device
        self.workers = Workers(torch.get_num_threads())
        photos = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]
        self.photos = [photos[i % len(photos)].resize((size, size)) for i in range(batch)]
        self.images = torch.from_numpy(np.stack([np.asarray(photo) for photo in self.photos])).to(device)

    def operation(self, op: Op) -> dict[str, float]:
        """Time one RandAugment operation on every image, uint8 to uint8."""
        recipe = augment_recipe("fat", size=self.size, erase=0.0)
        params = self.params(recipe)
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
        ours, plain = self.augments(recipe)

        def pil() -> None:
            for i, photo in enumerate(self.photos):
                reference.rand_augment(photo, recipe, params, i)

        return self._compare(
            ours=lambda: ours.apply_ops(self.images, params),
            torch=lambda: plain.apply_ops(self.images, params),
            pil=pil,
        )

    def recipe(self, name: str) -> dict[str, float]:
        """Time everything between the decoded crop and the final tensor, except mixing."""
        recipe = augment_recipe(name, size=self.size)
        params = self.params(recipe)
        ours, plain = self.augments(recipe)

        def pil() -> None:
            torch.stack([pil_sample(photo, recipe, params, i) for i, photo in enumerate(self.photos)])

        return self._compare(ours=lambda: ours(self.images, params), torch=lambda: plain(self.images, params), pil=pil)

    def mixed(self) -> dict[str, float]:
        """Time the complete recipe, with mixup and CutMix. PIL has no counterpart."""
        recipe = augment_recipe("fat", size=self.size)
        params, mixing = self.params(recipe), self.mixing(recipe)
        ours, plain = self.augments(recipe)
        return self._compare(
            ours=lambda: ours(self.images, params, mixing), torch=lambda: plain(self.images, params, mixing)
        )

    def random_draws(self) -> dict[str, float]:
        """Time the random draws."""
        recipe = augment_recipe("fat", size=self.size)
        lanes = np.arange(self.batch) // 16
        parts: dict[str, Callable[[], Any]] = {
            "draws of samples": lambda: self.params(recipe),
            "draws of mixing": lambda: draws.mix_params(recipe, seed=0, step=0, lanes=lanes),
        }
        return {name: statistics.median(self.time(part) for _ in range(self.pairs)) for name, part in parts.items()}

    def augments(self, recipe: AugmentRecipe) -> tuple[BatchAugment, BatchAugment]:
        """Return our implementation and that in PyTorch."""
        ours = BatchAugment(recipe, self.device, workers=self.workers)
        return ours, BatchAugment(recipe, self.device, kernels=False)

    def mixing(self, recipe: AugmentRecipe) -> MixParams:
        return draws.mix_params(recipe, seed=0, step=0, lanes=np.arange(self.batch) // 2)

    def _compare(self, **ways: Callable[[], Any]) -> dict[str, float]:
        """Return the median time of each way, and the median ratio of ours to each of the others."""
        for way in ways.values():
            way()  # warm-up
        rounds = [{name: self.time(way) for name, way in ways.items()} for _ in range(self.pairs)]
        found = {name: statistics.median(each[name] for each in rounds) for name in ways}
        others = [name for name in ways if name != "ours"]
        return found | {
            f"ours over {name}": statistics.median(each["ours"] / each[name] for each in rounds) for name in others
        }

    def time(self, work: Callable[[], Any]) -> float:
        """Return the microseconds per image of processing one batch."""
        if self.device.type == "cpu":
            start = time.process_time()
            work()
            return (time.process_time() - start) / self.batch * 1e6
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.batch * 1e6

    def params(self, recipe: AugmentRecipe) -> SampleParams:
        ids, sides = np.arange(self.batch), np.full(self.batch, self.size)
        return draws.draw(recipe, seed=0, epoch=0, ids=ids, heights=sides, widths=sides)


class OnGpu:
    """Compares the Triton kernels with PyTorch on the same photos and draws, and both with a training step."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.recipe = bench, augment_recipe("fat", size=bench.size)
        self.params = bench.params(self.recipe)
        self.mixing = bench.mixing(self.recipe)

    def report(self) -> dict[str, Any]:
        ways = {
            way: BatchAugment(self.recipe, self.bench.device, torch.bfloat16, kernels=way == "kernels")
            for way in ("torch", "kernels")
        }
        step, copy = self.step_seconds(), self.copied_per_second()
        parts: dict[str, Callable[[BatchAugment], Any]] = {
            "RandAugment": lambda augment: augment.apply_ops(self.bench.images, self.params),
            "all": lambda augment: augment(self.bench.images, self.params, self.mixing),
        }
        rows: list[dict[str, Any]] = [
            {"part": part, "way": way, **self.figures(functools.partial(work, augment), step)}
            for part, work in parts.items()
            for way, augment in ways.items()
        ]
        moved = self.moved()
        kernels = next(row for row in rows if row["part"] == "RandAugment" and row["way"] == "kernels")
        return {
            "batch": self.bench.batch,
            "step ms": round(step * 1e3, 2),
            "copy GB/s": round(copy / 1e9, 1),
            "RandAugment's bytes": moved,
            "share of the copy's bandwidth": round(moved / (kernels["device ms"] / 1e3) / copy, 3)
            if kernels["device ms"]
            else None,
            "rows": rows,
        }

    def figures(self, work: Callable[[], Any], step: float) -> dict[str, float]:
        """Return launches, device time and elapsed time for one batch."""
        work()  # compiles the kernels
        launches, working = on_the_device(work)
        times = [self.bench.time(work) * self.bench.batch / 1e6 for _ in range(self.bench.pairs)]
        return {
            "launches": launches,
            "device ms": round(working * 1e3, 4),
            "ms": round(statistics.median(times) * 1e3, 4),
            "share of a step": round(working / step, 4),
        }

    def moved(self) -> int:
        """Return the bytes that RandAugment must read and write.

        Each round reads and writes each of its samples once; each histogram reads its sample once more.
        """
        todo = passes.plan_passes(self.params, self.bench.size, self.bench.size, flip=False)
        return sum((2 * len(each.jobs) + len(each.histogram_jobs)) * self.bench.images[0].numel() for each in todo)

    def step_seconds(self) -> float:
        """Time a FAT-B0 step under bf16 autocast, replayed as a CUDA graph (the fastest mode without a compiler)."""
        from benchmarks.step import step

        options = argparse.Namespace(batch=self.bench.batch, size=self.bench.size, dtype="bfloat16")
        once = step("fat_b0", "graph", True, options)
        once()
        return statistics.median(self.bench.time(once) * self.bench.batch / 1e6 for _ in range(self.bench.pairs))

    def copied_per_second(self) -> float:
        """Return the bandwidth of a device-to-device copy in bytes/s."""
        from benchmarks.kernels import Clock, copy_bandwidth

        return copy_bandwidth(Clock(self.bench.pairs))


def on_the_device(work: Callable[[], Any]) -> tuple[int, float]:
    """Return the number of kernels and copies, and their total device time in seconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    done = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return len(done), sum(event.time_range.elapsed_us() for event in done) / 1e6


def pil_sample(photo: Image.Image, recipe: AugmentRecipe, params: SampleParams, i: int) -> torch.Tensor:
    """Augment one decoded image as a DataLoader worker does."""
    pixels = torch.from_numpy(np.array(reference.rand_augment(photo, recipe, params, i)))
    values = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    values.sub_(torch.tensor(recipe.mean)[:, None, None]).div_(torch.tensor(recipe.std)[:, None, None])
    y, x, height, width = params.erase_boxes[i].tolist()
    values[:, y : y + height, x : x + width] = torch.empty(3, height, width).normal_()
    return values


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and library versions."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def show(report: dict[str, Any]) -> None:
    print(json.dumps({key: report[key] for key in ("machine", "settings", "unit")}))
    print(f"{'':26}{'ours':>8}{'PyTorch':>8}{'PIL':>8}{'ours/PIL':>9}")
    for name, row in (report["operations"] | report["recipes"]).items():
        pil = f"{row['pil']:8.0f}{row['ours over pil']:9.2f}" if "pil" in row else ""
        print(f"{name:26}{row['ours']:8.0f}{row['torch']:8.0f}{pil}")
    for name, value in report["draws"].items():
        print(f"{name:26}{value:8.0f}")
    if "on a GPU" in report:
        found = report["on a GPU"]
        print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
        for row in found["rows"]:
            print(
                f"{row['part']:12}{row['way']:8}{row['launches']:4} launches, {row['ms']:8.3f} ms elapsed, "
                f"{row['device ms']:8.3f} ms device time: {row['share of a step']:.1%} of a step"
            )


if __name__ == "__main__":
    main()
