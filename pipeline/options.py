"""Loader options: they change how fast and how patient a loader is, never which samples and augmentations it delivers.

Pixels depend on which decoder decodes: `loader` and `hw_decoder_load`. Options left open (None) come to the
defaults of `LoaderSettings`; `hw_decoder_load` is chosen by the device (`pipeline.decode.hardware`).
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
# Thread and queue sizes beyond which a machine of today gains nothing and only loses memory.
ReadThreads = Annotated[int, Interval(ge=1, le=1024)]
DecodeThreads = Annotated[int, Interval(ge=1, le=512)]
Ahead = Annotated[int, Interval(ge=0, le=256)]
AtLeastOneAhead = Annotated[int, Interval(ge=1, le=64)]
MAX_PREALLOCATED = 1 << 27  # pixels; 0.4 GB
JpegSide = Annotated[int, Interval(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """What the options come to."""

    read_threads: int = 32
    """Enough to decode at full speed from a file system that takes 20 ms per read; idle ones cost nothing."""
    read_ahead: int = 4
    decode_threads: int = field(default_factory=cores)
    decode_ahead: int = 2
    ready: int = 2
    hw_decoder_load: float = 0.0
    preallocate_width: int = 0
    preallocate_height: int = 0

    @property
    def ahead(self) -> int:
        """Batches that a loader holds when it has run as far ahead as it can."""
        return self.read_ahead + self.decode_ahead + self.ready


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """How DALI decodes on a GPU."""

    hw_decoder_load: Annotated[Fraction | None, default("1 where every rank can use such an engine, else 0")] = None
    """Fraction of each batch given to the GPU's JPEG engine; the CUDA decoder decodes the rest, and rounds differently.
    At any value between 0 and 1, pixels depend on a sample's place in its batch."""
    preallocate_width: Annotated[JpegSide | None, default("0")] = None
    """Decoder buffers are allocated for images of this width beforehand (0 = as they come); saves stalls at first."""
    preallocate_height: Annotated[JpegSide | None, default("0")] = None

    def __post_init__(self) -> None:
        check_ranges(self)
        width, height = self.preallocate_width or 0, self.preallocate_height or 0
        if width * height > MAX_PREALLOCATED:
            raise UserError(
                f"--preallocate-width {width}, --preallocate-height {height}: at most {MAX_PREALLOCATED:,} pixels "
                "expected, for each thread of the decoder"
            )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How a loader works. Which samples, crops and augmentations it delivers does not depend on it; the rounding of
    pixels depends on the decoder (`loader`, `hw_decoder_load`)."""

    loader: LoaderName = "auto"
    """Who decodes. auto = dali where the set has tars, ffcv where it has a .beton alone. synthetic = random images that
    are on the device already, to see how fast a model is without any input."""
    bad_samples: str = "raise"
    """What happens at a sample whose bytes are damaged or gone. raise = the run stops; skip:N = another sample takes
    its place (in an evaluation it is left out), for up to N such samples on a rank."""
    read_threads: Annotated[ReadThreads | None, default("32")] = None
    """Threads that read shards; more hide the latency of slow file systems."""
    read_ahead: Annotated[Ahead | None, default("4")] = None
    """Batches whose bytes are read before the decoder asks for them."""
    decode_threads: Annotated[DecodeThreads | None, default("the rank's share of the machine's cores")] = None
    """Threads of this rank that decode."""
    decode_ahead: Annotated[AtLeastOneAhead | None, default("2")] = None
    """Batches that are decoded at once."""
    ready: AtLeastOneAhead = 2
    """Finished batches that wait on the device."""
    check_hashes: bool = True
    """Compare each sample's bytes with the hash in the index."""
    feed_process: FeedProcess = "auto"
    """Read shards and draw augmentations in a separate process per rank, so that this does not compete with the
    training loop for Python's interpreter lock. auto = on for GPUs, off on CPUs."""
    dali: DaliOptions = field(default_factory=DaliOptions)

    def __post_init__(self) -> None:
        check_ranges(self)
        self.skip_budget  # noqa: B018 - refuses what it cannot read

    @property
    def settings(self) -> LoaderSettings:
        """All of them as numbers."""
        given = vars(self) | vars(self.dali)
        return LoaderSettings(**{f.name: given[f.name] for f in fields(LoaderSettings) if given[f.name] is not None})

    @property
    def skip_budget(self) -> int:
        """Damaged samples that a rank may meet: 0 under `raise`.

        Raises:
            UserError: `bad_samples` is neither raise nor skip:N.
        """
        if self.bad_samples == "raise":
            return 0
        match = re.fullmatch(r"skip:(\d{1,9})", self.bad_samples, re.ASCII)
        if match is None:
            raise UserError(
                f"--bad-samples {printable(self.bad_samples)}: raise, or skip:N as in skip:100 (N up to 999,999,999) "
                "expected"
            )
        return int(match[1])
