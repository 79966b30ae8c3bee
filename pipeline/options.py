"""Options of the loaders: decoder, threads, queue sizes and the handling of bad samples.

They do not change which samples, crops and augmentations a loader delivers. Pixel values depend on the decoder
(`loader` and `DaliOptions`), because decoders round differently, and on `memory_cache_short_side`. Unset options (None)
get the defaults of `LoaderSettings`, except `hw_decoder_load`, which depends on the device
(`pipeline.decode.hardware`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Interval

from shards.cores import cores
from shards.errors import UserError
from shards.option_help import default
from shards.ranges import Fraction, check_ranges
from shards.redact import printable

LoaderName = Literal["auto", "dali", "ffcv", "synthetic"]
FeedProcess = Literal["auto", "on", "off"]
DecodePath = Literal["window", "whole"]
# Upper limits of threads and queue sizes: larger values would only use more memory.
ReadThreads = Annotated[int, Interval(ge=1, le=1024)]
DecodeThreads = Annotated[int, Interval(ge=1, le=512)]
Ahead = Annotated[int, Interval(ge=0, le=256)]
AtLeastOneAhead = Annotated[int, Interval(ge=1, le=64)]
MAX_PREALLOCATED = 1 << 27  # maximum preallocated pixels per decoder thread (0.4 GB)
CacheGib = Annotated[float, Interval(ge=0, le=1 << 20)]
"""Size of a cache in GiB."""
CachedSide = Annotated[int, Interval(ge=1, le=65500)]
JpegSide = Annotated[int, Interval(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """The performance options of a loader with all defaults filled in. The fields are documented in `LoaderOptions` and
    `DaliOptions`."""

    read_threads: int = 32
    """Enough threads to keep the decoder busy on file systems with 20 ms per read; idle threads cost nothing."""
    read_ahead: int = 4
    decode_threads: int = field(default_factory=cores)
    decode_ahead: int = 2
    ready: int = 2
    decode: DecodePath = "window"
    cpu_decode: float = 0.0
    gpu_cache: float = 0.0
    hw_decoder_load: float = 0.0
    preallocate_width: int = 0
    preallocate_height: int = 0

    @property
    def ahead(self) -> int:
        """Largest number of batches that a loader holds ahead of the consumer."""
        return self.read_ahead + self.decode_ahead + self.ready


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """Options of DALI's decoders. They have no effect with another decoder."""

    decode: Annotated[DecodePath | None, default("window; whole with --gpu-cache")] = None
    """What is decoded. window: the crop window only. whole: the complete image, which is then cropped; on CPUs slower,
    with the same pixels (of windows wider than one pixel), on GPUs with other rounding."""
    gpu_cache: Annotated[CacheGib | None, default("0")] = None
    """Memory in GiB per rank, on its GPU (on CPUs: of its process), for complete decoded training images, which are not
    decoded again in later epochs. The first images of the rank that fit are kept. Needs --decode whole."""
    cpu_decode: Annotated[Fraction | None, default("0")] = None
    """Fraction (0 to 1) of all images that CPU threads decode while the GPU decodes the others. Which ones depends on
    their id alone. No effect on CPUs."""
    hw_decoder_load: Annotated[Fraction | None, default("DALI's, if every rank's GPU has a JPEG engine, else 0")] = None
    """Fraction (0 to 1) of each batch that the GPU's JPEG engine decodes; the CUDA decoder decodes the rest. The two
    round differently, so between 0 and 1 the pixels of a sample depend on its position in the batch. No effect on
    CPUs."""
    preallocate_width: Annotated[JpegSide | None, default("0")] = None
    """Width in pixels of the images for which decoder buffers are allocated in advance, which avoids stalls in the
    first batches. 0: allocate buffers as images arrive."""
    preallocate_height: Annotated[JpegSide | None, default("0")] = None
    """Height in pixels of the images for which decoder buffers are allocated in advance."""

    def __post_init__(self) -> None:
        check_ranges(self)
        width, height = self.preallocate_width or 0, self.preallocate_height or 0
        if width * height > MAX_PREALLOCATED:
            raise UserError(
                f"--preallocate-width {width}, --preallocate-height {height}: {width * height:,} pixels per decoder "
                f"thread, but at most {MAX_PREALLOCATED:,} are allowed"
            )
        if self.gpu_cache and self.decode == "window":
            raise UserError(
                f"--gpu-cache {self.gpu_cache:g} --decode window: the cache holds complete images; use --decode whole"
            )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options of a loader. They do not change which samples, crops and augmentations it delivers; pixel values depend
    on the decoder (`loader`, `DaliOptions`), because decoders round differently."""

    loader: LoaderName = "auto"
    """Decoder. auto: ffcv if the set has only .beton files with JPEGs, else dali. Images that are stored as pixels are
    only cropped and resized, which needs neither. synthetic: the same random images in every batch, already on the
    device, to measure the speed of a model without input."""
    bad_samples: str = "raise"
    """Handling of samples whose bytes are damaged or missing. raise: stop the run. skip:N: use a replacement sample (in
    an evaluation, omit the sample) for up to N bad samples per rank."""
    read_threads: Annotated[ReadThreads | None, default("32")] = None
    """Threads that read shards, per rank; more threads hide the latency of slow file systems."""
    read_ahead: Annotated[Ahead | None, default("4")] = None
    """Batches that are read ahead of the decoder."""
    decode_threads: Annotated[DecodeThreads | None, default("the machine's cores divided among its ranks")] = None
    """Threads that decode images, and on a CPU as many threads that augment them, per rank."""
    decode_ahead: Annotated[AtLeastOneAhead | None, default("2")] = None
    """Batches that are decoded concurrently."""
    ready: AtLeastOneAhead = 2
    """Finished batches that wait on the device for the training loop."""
    check_hashes: bool = True
    """Compare the bytes of each sample with the hash in the index."""
    feed_process: FeedProcess = "auto"
    """Read shards and draw augmentations in a separate process per rank (the feed process), which does not compete
    with the training loop for Python's global interpreter lock. auto: on with a GPU, off on a CPU."""
    memory_cache: CacheGib = 0.0
    """GiB of each node's memory for decoded training images, which are then neither read nor decoded again. All ranks
    of a node share one copy. It is filled in the first epoch. 0: no cache."""
    memory_cache_short_side: Annotated[CachedSide | None, default("images keep their size")] = None
    """Short side in pixels to which larger images are shrunk before they are cached, such as 256. It needs less memory,
    but changes the pixels of the samples that are cached."""
    dali: DaliOptions = field(default_factory=DaliOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.memory_cache_short_side is not None and not self.memory_cache:
            raise UserError(
                f"--memory-cache-short-side {self.memory_cache_short_side}: has no effect without --memory-cache; add "
                "it, or omit this option"
            )
        if self.memory_cache and self.loader == "synthetic":
            raise UserError(
                f"--memory-cache {self.memory_cache:g} --loader synthetic: synthetic images are neither read nor "
                "decoded; omit --memory-cache"
            )
        if self.memory_cache and self.dali.gpu_cache:
            raise UserError(
                f"--memory-cache {self.memory_cache:g} --gpu-cache {self.dali.gpu_cache:g}: a run has one cache of "
                "decoded images; choose the memory of the node or that of its GPUs"
            )
        self.skip_budget  # noqa: B018 - raises UserError if `bad_samples` is invalid

    @property
    def settings(self) -> LoaderSettings:
        """The performance options with defaults filled in."""
        given = vars(self) | vars(self.dali)
        given["decode"] = self.dali.decode or ("whole" if self.dali.gpu_cache else "window")
        return LoaderSettings(**{f.name: given[f.name] for f in fields(LoaderSettings) if given[f.name] is not None})

    @property
    def skip_budget(self) -> int:
        """Number of bad samples that a rank tolerates; 0 for `raise`.

        Raises:
            UserError: `bad_samples` is neither raise nor skip:N.
        """
        if self.bad_samples == "raise":
            return 0
        match = re.fullmatch(r"skip:(\d{1,9})", self.bad_samples, re.ASCII)
        if match is None:
            raise UserError(
                f"--bad-samples {printable(self.bad_samples)}: expected raise, or skip:N such as skip:100 (N up to "
                "999,999,999)"
            )
        return int(match[1])
