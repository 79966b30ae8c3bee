"""Compare the two JPEG decoders of a GPU on the first training batch of a shard set: pixels and images/s.

    python benchmarks/jpeg_decoders.py SET [--batch 256] [--size 224] [--seconds 1] [--out FILE.json]

DALI decodes, crops and resizes the same batch at `--hw-decoder-load` 0 (CUDA decoder), 1 (JPEG engine) and 0.9 (both).
The output is the rate of each, and the difference of the pixels of engine and CUDA decoder in levels of 0..255. Equal
pixels at equal speed suggest that the engine is not used. Meant for GPUs with a JPEG engine (A100, H100, ...); without
a usable engine, the reason is printed and nothing is compared.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from launch.config.data import DataConfig
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.machine.world import World
from pipeline.augment.params import draw
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.hardware import find_jpeg_engine
from pipeline.decode.job import DecodeJob, Decoder
from pipeline.options import LoaderSettings
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader

LOADS = (0.0, 1.0, 0.9)
WARM_UP = 3  # batches in which the decoder allocates its buffers
EQUAL = 1.02  # two rates are considered equal if their ratio is below this


@dataclass(frozen=True)
class Options:
    """Compare a GPU's JPEG engine with its CUDA decoder."""

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    batch: int = 256
    """Images per batch."""
    size: int = 224
    """Side of the decoded images in pixels."""
    seconds: float = 1.0
    """Seconds of measurement per value of `hw_decoder_load`, after a warm-up."""
    out: Path | None = None
    """Write the results to this JSON file."""


@dataclass(frozen=True)
class Comparison:
    """Differences between the JPEG engine and the CUDA decoder."""

    images: int
    mean: float
    """Mean absolute difference in pixel levels of 0..255."""
    max: int
    """Maximum absolute difference in pixel levels of 0..255."""
    differing: float
    """Fraction of the values that differ."""
    rates: dict[str, float]
    """Images per second of decoding, by `hw_decoder_load`."""

    @property
    def unused(self) -> bool:
        """Whether the engine appears not to be used."""
        cuda, engine = self.rates["0"], self.rates["1"]
        return self.max == 0 and max(cuda, engine) < EQUAL * min(cuda, engine)

    def __str__(self) -> str:
        rates = ", ".join(f"{load}: {rate:,.0f}" for load, rate in self.rates.items())
        return (
            f"engine against CUDA over {self.images} images: mean {self.mean:.3f}, max {self.max} levels, "
            f"{self.differing:.1%} of the values differ; decoding, images/s by --hw-decoder-load: {rates}"
            + ("; the JPEG engine appears not to be used" if self.unused else "")
        )


def first_batch(feed: Feed) -> DecodeJob:
    """Return the first batch of training, encoded, with its crop windows and flips."""
    plan, ids = feed.plan, feed.plan.ids(feed.plan.at(0), feed.shape.rows(0))
    pinned = feed.world.device.type == "cuda"
    with SampleReader(open_storage(feed.dataset, "train"), check=False, buffers=BufferPool(pinned=pinned)) as reader:
        encoded = reader.read(ids).checked()
    rows = encoded.rows
    drawn = draw(feed.augment, seed=plan.seed, epoch=0, ids=ids, heights=rows["height"], widths=rows["width"])
    return DecodeJob(encoded=encoded, window=drawn.windows, size=feed.augment.size, flip=drawn.flips)


def compare(
    decoder: Callable[[float], Decoder],
    job: DecodeJob,
    *,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Decode `job` repeatedly at each load.

    Args:
        decoder: creates a decoder that assigns the given fraction of the batch to the engine.
        seconds: measured time per load.
        now: clock, in seconds.
    """
    pixels, rates = dict[float, torch.Tensor](), dict[str, float]()
    for load in LOADS:
        stream = decoder(load).decode((job, None) for _ in itertools.count())
        for _ in range(WARM_UP):
            images, _, _ = next(stream)
        pixels[load] = images.cpu().short()
        begun, taken = now(), 0
        while now() - begun < seconds:
            images, _, _ = next(stream)
            images[0, 0, 0, 0].item()  # reading a value waits until the batch is decoded
            taken += len(images)
        rates[f"{load:g}"] = taken / (now() - begun)
        stream.close()
    difference = (pixels[1.0] - pixels[0.0]).abs()
    return Comparison(
        images=len(difference),
        mean=difference.double().mean().item(),
        max=int(difference.max()),
        differing=(difference > 0).double().mean().item(),
        rates=rates,
    )


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine = find_jpeg_engine(device)
    found: dict[str, object] = {"engine": engine.found}
    if engine.usable:
        recipe = Recipe(data=DataConfig(data=options.dataset, global_batch=options.batch, size=options.size))
        feed = Feed.of(recipe, World(0, 1, 0, 1, device))

        def decoder(load: float) -> DaliDecoder:
            settings = LoaderSettings(hw_decoder_load=load)
            return DaliDecoder(options.batch, device, threads=settings.decode_threads, settings=settings)

        own = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(own):  # the loaders also decode on a separate stream
            comparison = compare(decoder, first_batch(feed), seconds=options.seconds)
        found |= {"decoders": str(comparison)} | asdict(comparison)
    else:
        found["decoders"] = f"not compared: {engine.found}"
    print(f"JPEG decoders ({engine.found}): {found['decoders']}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
