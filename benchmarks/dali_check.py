"""Check each DALI operator that the loader uses: decode, resize, flip, normalize, evaluation crop.

    python benchmarks/dali_check.py PHOTOS [--device cuda|cpu] [--batch 64] [--out FILE.json]

Run it on a new GPU machine before a training run: a problem of the driver or DALI is then reported for one operator.
PHOTOS is a folder written by `pipeline sample photos`. With a GPU, images are decoded by the CUDA decoder and by the
hardware decoder (`mixed` backend) and their pixels are compared: if they differ, the pixels of a sample depend on its
row in the batch, because the decoders share a batch. With --device cpu, all operators run on DALI's CPU backend.
The remaining checks run even if one fails. Exit status: 0 all checks passed, 1 some failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from benchmarks.decode import RECIPE, SIZE, photos
from benchmarks.model import reason
from pipeline.decode.hardware import find_jpeg_engine
from shards.cores import cores

WINDOW_START, WINDOW_SIDE = 8, 64  # pixels; every photo is large enough for this crop window
BATCHES, WARM_UP, TIMED = 3, 4, 24
RATE_BATCH = 4  # batch size for throughput, as a multiple of --batch
CUBIC = {"interp_type": types.INTERP_CUBIC, "antialias": True}


@dataclass(frozen=True)
class Row:
    """The result of one check."""

    check: str
    found: str
    seconds: float
    failed: bool = False


@dataclass
class Checks:
    """The checks for one device.

    Args:
        images: encoded JPEGs, used in order for the batches.
        device: cuda or cpu.
        batch: images per batch.
    """

    images: list[np.ndarray]
    device: str
    batch: int

    def run(self) -> Iterator[Row]:
        """Run all checks; yield each result as soon as it is known."""
        for name, work in (self.on_gpu() if self.device == "cuda" else self.on_cpu()).items():
            start = time.perf_counter()
            try:
                found, failed = work(), False
            except Exception as error:
                traceback.print_exc()
                found, failed = f"FAILED {reason(error)}", True
            yield Row(name, found, round(time.perf_counter() - start, 2), failed)

    def on_gpu(self) -> dict[str, Callable[[], str]]:
        return {
            "hardware decoder": lambda: find_jpeg_engine(torch.device("cuda", 0)).found,
            "decode a window, CUDA only": partial(self.outputs, "decode", load=0.0),
            "decode a window, hardware": partial(self.outputs, "decode", load=1.0),
            "decode whole images, hardware": partial(self.outputs, "decode", load=1.0, window=False),
            **self.later_stages(),
            "hardware against CUDA decoder": self.difference,
            **{f"images/s at hw_decoder_load {load:g}": partial(self.rate, load=load) for load in (0.0, 1.0, 0.9)},
            "images/s at 0.9 with 8 threads": partial(self.rate, load=0.9, threads=8),
        }

    def on_cpu(self) -> dict[str, Callable[[], str]]:
        return {
            "decode a window": partial(self.outputs, "decode"),
            "decode whole images": partial(self.outputs, "decode", window=False),
            **self.later_stages(),
            "images/s": self.rate,
        }

    def later_stages(self) -> dict[str, Callable[[], str]]:
        return {
            "resize": partial(self.outputs, "resize"),
            "resize, flip": partial(self.outputs, "flip"),
            "resize, flip, normalize": partial(self.outputs, "normalize"),
            "evaluation: resize, crop": partial(self.outputs, "evaluation"),
        }

    def outputs(self, stage: str, **options: Any) -> str:
        """Run some batches and describe shape, dtype and mean of the last one."""
        pipe = self.pipeline(stage, **options)
        for _ in range(BATCHES):
            found = self.next(pipe)
        shapes = {tuple(image.shape) for image in found}
        mean = torch.stack([image.float().mean() for image in found]).mean().item()
        if not np.isfinite(mean) or (stage != "normalize" and not 0 < mean < 255):
            raise ValueError(f"mean pixel value {mean} is not plausible for photos")
        shown = str(next(iter(shapes))) if len(shapes) == 1 else f"{len(shapes)} shapes"
        return f"{len(found)} images, {shown}, {found[0].dtype} on {found[0].device}, mean {mean:.2f}"

    def difference(self) -> str:
        """Compare the pixels of the CUDA and the hardware decoder."""
        by_cuda, by_hardware = (self.next(self.pipeline("decode", load=load)) for load in (0.0, 1.0))
        levels = torch.stack([(a.float() - b.float()).abs() for a, b in zip(by_cuda, by_hardware, strict=True)])
        differing = (levels > 0).float().mean().item()
        return f"mean {levels.mean().item():.3f}, max {levels.max().item():.0f}, {differing:.1%} of values differ"

    def rate(self, **options: Any) -> str:
        batch = RATE_BATCH * self.batch
        pipe = self.pipeline("flip", batch=batch, **options)
        batches = TIMED if self.device == "cuda" else 1
        for _ in range(WARM_UP if self.device == "cuda" else 1):
            pipe.run()
        start = time.perf_counter()
        for _ in range(batches):
            pipe.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return f"{batches * batch / (time.perf_counter() - start):,.0f}"

    def next(self, pipe: Pipeline) -> list[torch.Tensor]:
        """Return the images of the next batch, copied out of DALI's memory."""
        if self.device == "cpu":
            (images,) = pipe.run()
            return [torch.from_numpy(np.array(image)) for image in images]
        stream = torch.cuda.current_stream()
        (images,) = pipe.run(stream)
        if images.is_dense_tensor():
            return list(torch.from_dlpack(images.as_tensor()).clone())
        return [torch.from_dlpack(images[i]).clone() for i in range(len(images))]

    def pipeline(
        self,
        stage: str,
        *,
        batch: int | None = None,
        load: float = 0.9,
        threads: int | None = None,
        window: bool = True,
    ) -> Pipeline:
        """Build a pipeline up to a stage.

        Args:
            load: fraction of the images for the hardware decoder (GPU only).
            window: True: decode a crop window of each image; False: decode complete images.
        """
        on_gpu, batch = self.device == "cuda", batch or self.batch
        counter = itertools.count()

        def source() -> tuple[Any, ...]:
            first = next(counter) * batch
            numbers = np.arange(first, first + batch)
            pair = np.ones((batch, 2), np.int32)
            encoded = [self.images[number % len(self.images)] for number in numbers]
            return encoded, WINDOW_START * pair, WINDOW_SIDE * pair, (numbers[:, None] % 2).astype(np.int32)

        pipe = Pipeline(
            batch_size=batch,
            num_threads=threads or cores(),
            device_id=0 if on_gpu else None,
            prefetch_queue_depth=2,
            seed=0,
        )
        decoder: dict[str, Any] = {"device": "cpu", "adjust_orientation": False, "output_type": types.RGB}
        if on_gpu:
            decoder |= {"device": "mixed", "hw_decoder_load": load}
        with pipe:
            encoded, start, shape, mirror = fn.external_source(source=source, num_outputs=4, batch=True)
            if window:
                images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **decoder)
            else:
                images = fn.decoders.image(encoded, **decoder)
            if stage == "evaluation":
                images = fn.resize(images, size=shape * 2.0, **CUBIC)
                images = fn.slice(images, start=start, shape=[WINDOW_SIDE, WINDOW_SIDE], axis_names="HW")
            elif stage != "decode":
                images = fn.resize(images, size=[SIZE, SIZE], **CUBIC)
            if stage == "flip":
                images = fn.flip(images, horizontal=mirror)
            if stage == "normalize":
                mean, std = ([255 * value for value in values] for values in (RECIPE.mean, RECIPE.std))
                images = fn.crop_mirror_normalize(
                    images, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std, mirror=mirror
                )
            pipe.set_outputs(images)
        return pipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder written by `pipeline sample photos`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the operators")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    # All stages share one external source, and some do not use all of its outputs.
    warnings.filterwarnings("ignore", message="The external source node")
    images, _ = photos(options.photos)
    if not images:
        parser.error(
            f"{options.photos}: no file matches train/*/*.JPEG; create the folder with: pipeline sample photos "
            f"{options.photos}"
        )
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("PyTorch finds no CUDA device; use --device cpu to check DALI's CPU backend")
        torch.zeros(1, device="cuda")  # creates the CUDA context, which DALI then shares
    rows: list[Row] = []
    for row in Checks(images, options.device, options.batch).run():
        rows.append(row)
        print(f"{row.check:34} {row.found} ({row.seconds:.1f} s)", flush=True)
        if options.out:  # write after each check, so that a crash in a library loses only that check's result
            options.out.write_text(json.dumps({"results": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
