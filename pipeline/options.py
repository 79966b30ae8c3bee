"""How loaders work: options that change their speed and their patience, never what they deliver."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from shards.errors import UserError

LoaderName = Literal["auto", "dali", "ffcv", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """How DALI works; none of it changes what comes out."""

    hw_decoder_load: float = 0.9
    """Share of the images given to the GPU's JPEG engine, where it has one; the rest goes to its CUDA decoder."""
    preallocate_width: int = 0
    """Decoder buffers are allocated for images of this width beforehand (0 = as they come); saves stalls at first."""
    preallocate_height: int = 0


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How a loader works. Which samples, crops and augmentations it delivers does not depend on it; pixels do a little
    on who decodes (`loader`)."""

    loader: LoaderName = "auto"
    """Who decodes. auto = dali where the set has tars, ffcv where it has a .beton alone. synthetic = random images that
    are on the device already, to see how fast a model is without any input."""
    bad_samples: str = "raise"
    """What happens at a sample whose bytes are damaged or gone. raise = the run stops; skip:N = another sample takes
    its place (in an evaluation it is left out), for up to N such samples on a rank."""
    read_threads: int | None = None
    """Threads that read shards; more hide the latency of slow file systems. None = 32."""
    read_ahead: int = 4
    """Batches whose bytes are read before the decoder asks for them."""
    decode_threads: int | None = None
    """Threads of this rank that decode. None = its share of the machine's cores."""
    decode_ahead: int = 2
    """Batches that are decoded at once."""
    ready: int = 2
    """Finished batches that wait on the device."""
    check_hashes: bool = True
    """Compare each sample's bytes with the hash in the index."""
    dali: DaliOptions = field(default_factory=DaliOptions)

    def __post_init__(self) -> None:
        self.skip_budget  # noqa: B018 - refuses what it cannot read

    @property
    def skip_budget(self) -> int:
        """Damaged samples that a rank may meet: 0 under `raise`.

        Raises:
            UserError: `bad_samples` is neither raise nor skip:N.
        """
        if self.bad_samples == "raise":
            return 0
        match = re.fullmatch(r"skip:(\d+)", self.bad_samples)
        if match is None:
            raise UserError(f"--bad-samples {self.bad_samples}: raise, or skip:N as in skip:100, expected")
        return int(match[1])
