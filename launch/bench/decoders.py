"""Compare the two JPEG decoders of a GPU on a batch of the set: their pixels, and what sharing a batch gains."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from launch.feed import Feed
from launch.jpeg_decoder import decodes_on_gpu
from pipeline.augment.params import draw
from pipeline.decode.choose import make_decoder
from pipeline.decode.hardware import JpegEngine, engine_utilization, find_jpeg_engine
from pipeline.decode.job import DecodeJob, Decoder
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.placement import storage_of
from pipeline.storage.reader import SampleReader
from shards.errors import first_line

LOADS = (0.0, 1.0, 0.9)
SECONDS = 1.0  # per load, after a warm-up: long enough for one sampling period of the engine's counter
WARM_UP = 3  # batches; the decoder allocates its buffers meanwhile
# Rates that differ by less are equal.
NOTICEABLE = 1.02

Now = Callable[[], float]


@dataclass(frozen=True)
class DecoderFigures:
    """How the JPEG engine and the CUDA decoder differ."""

    skipped: str = ""
    """Why nothing was compared; else empty."""
    engine: str = ""
    """What was found out about the engine."""
    images: int = 0
    """JPEGs of the set that both have decoded, cropped and resized as for training."""
    mean: float = 0.0
    """Absolute difference in pixel levels of 0..255, over all values."""
    max: int = 0
    differing: float = 0.0
    """Share of the values that differ."""
    rates: dict[str, float] = field(default_factory=dict)
    """Images per second of decoding, by `hw_decoder_load`."""
    utilization: int | None = None
    """Of the JPEG engines at load 1, in percent; None = the driver does not say."""

    def lines(self) -> list[str]:
        """The figures as text."""
        if self.skipped:
            return [f"JPEG decoders not compared: {self.skipped}"]
        speeds = ", ".join(f"{load}: {rate:,.0f}" for load, rate in self.rates.items())
        busy = "" if self.utilization is None else f"; JPEG engines {self.utilization} % busy at load 1"
        pixels = (
            f"mean {self.mean:.3f}, max {self.max} levels, {self.differing:.1%} of the values differ"
            if self.max
            else "no difference"
        )
        return [
            f"JPEG decoders ({self.engine}): engine against CUDA over {self.images} images: {pixels}",
            f"decoding, images/s by --hw-decoder-load: {speeds}; sharing gains {self.gain - 1:+.0%}{busy}",
            *([self.unused] if self.unused else []),
        ]

    @property
    def gain(self) -> float:
        """The best rate of a shared batch over the best of an undivided one."""
        whole, shared = (
            [rate for load, rate in self.rates.items() if (load in ("0", "1")) is undivided]
            for undivided in (True, False)
        )
        return max(shared) / max(whole)

    @property
    def unused(self) -> str:
        """The line for an engine that is there but seems to decode nothing; else empty."""
        alike = self.rates["1"] < NOTICEABLE * self.rates["0"] and self.rates["0"] < NOTICEABLE * self.rates["1"]
        if self.utilization == 0 or (self.utilization is None and self.max == 0 and alike):
            return "the JPEG engine seems to decode nothing: DALI may not give it images with a crop window"
        return ""


def compare_decoders(feed: Feed, *, engine: JpegEngine | None = None) -> DecoderFigures:
    """Decode one batch of the training split with either decoder, and time both and their sharing; some seconds.

    Args:
        engine: of the device, if it is known already.
    """
    if not decodes_on_gpu(feed):
        return DecoderFigures(skipped="only a GPU has two, and only DALI uses them")
    engine = engine or find_jpeg_engine(feed.world.device)
    if not engine.usable:
        return DecoderFigures(skipped=engine.found, engine=engine.found)
    options, rows = feed.loader_options, feed.shape.micro_rows

    def decoder(load: float) -> Decoder:
        return make_decoder(
            "dali",
            dataclasses.replace(options, dali=dataclasses.replace(options.dali, hw_decoder_load=load)),
            size=feed.augment.size,
            batch=rows,
            device=feed.world.device,
            evaluation=False,
            normalisation=None,
        )

    try:
        with engine_utilization(feed.world.device) as utilization, _own_stream(feed.world.device):
            return measure_decoders(decoder, batch_of(feed), engine=engine.found, utilization=utilization)
    except Exception as error:  # the other figures, which are measured already, are worth having all the same
        return DecoderFigures(skipped=f"failed ({type(error).__name__}: {first_line(error)})", engine=engine.found)


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream for decoding, as loaders have one."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if torch.cuda.is_available() else nullcontext()


def batch_of(feed: Feed) -> DecodeJob:
    """The first batch of training, encoded, with its crop windows and flips."""
    plan, ids = feed.plan, feed.plan.ids(feed.plan.at(0), feed.shape.rows(0))
    pinned = feed.world.device.type == "cuda"
    with SampleReader(storage_of(feed.dataset, "train"), check=False, buffers=BufferPool(pinned=pinned)) as reader:
        encoded = reader.read(ids).checked()
    rows = encoded.rows
    drawn = draw(feed.augment, seed=plan.seed, epoch=0, ids=ids, heights=rows["height"], widths=rows["width"])
    return DecodeJob(encoded=encoded, window=drawn.windows, flip=drawn.flips)


def measure_decoders(
    decoder: Callable[[float], Decoder],
    job: DecodeJob,
    *,
    engine: str,
    utilization: Callable[[], int | None] = lambda: None,
    loads: Sequence[float] = LOADS,
    seconds: float = SECONDS,
    now: Now = time.perf_counter,
) -> DecoderFigures:
    """Decode `job` again and again at each load.

    Args:
        decoder: makes a decoder that gives a share of the batch to the engine.
        job: the batch.
        utilization: of the engines, in percent.
        seconds: per load.
        now: the clock, in seconds.
    """
    pixels, rates, busy = dict[float, torch.Tensor](), dict[str, float](), None
    for load in loads:
        stream = decoder(load).decode((job, None) for _ in itertools.count())
        for _ in range(WARM_UP):
            images, _, _ = next(stream)
        pixels[load] = images.cpu().clone()
        begun, taken = now(), 0
        while now() - begun < seconds:
            images, _, _ = next(stream)
            images[0, 0, 0, 0].item()  # waits until the batch is decoded
            taken += len(images)
        rates[f"{load:g}"] = taken / (now() - begun)
        if load == 1:
            busy = utilization()
        stream.close()
    difference = np.abs(pixels[1.0].numpy().astype(np.int16) - pixels[0.0].numpy().astype(np.int16))
    return DecoderFigures(
        engine=engine,
        images=len(difference),
        mean=float(difference.mean()),
        max=int(difference.max()),
        differing=float((difference > 0).mean()),
        rates=rates,
        utilization=busy,
    )
