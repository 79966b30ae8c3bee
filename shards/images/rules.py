"""Options for converting images, and the two outcomes: `Accepted` and `Rejected`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Check = Literal["decode", "header"]


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Options for converting images. Each of them changes the bytes of the shard set."""

    check: Check = "decode"
    """decode: decode every image. header: check headers only (faster, but training may encounter damaged images)."""
    max_side: int | None = None
    """Shrink images whose longer side exceeds this number of pixels."""
    short_side: int | None = None
    """Shrink images whose shorter side exceeds this number of pixels."""
    quality: int = 90
    """JPEG quality of images that are shrunk."""
    pixels: bool = False
    """Store the pixels of all images instead of JPEGs."""

    @property
    def shrinks(self) -> bool:
        """Whether large images are shrunk."""
        return self.max_side is not None or self.short_side is not None

    @property
    def filter(self) -> Literal["hamming", "bicubic"]:
        """Antialiasing filter for shrinking (benchmarks/sets.py compares them).

        Bicubic is the filter of evaluations, so that shrunk pixels equal what an evaluation would compute. It takes 1.4
        times as long as Hamming, and JPEG compression hides nearly all of the difference.
        """
        return "bicubic" if self.pixels else "hamming"


@dataclass(frozen=True)
class Accepted:
    """An image to store in the shard set."""

    data: bytes
    """A JPEG; with `ImageRules.pixels`, uint8 [height, width, 3], RGB."""
    height: int
    width: int
    orientation: int
    repair: str | None = None
    """Why the image could not be kept as it was; None if it was a standard JPEG."""
    blank: bool = False
    """Whether the image is nearly black or of a single color; always False with check="header"."""


class Rejected(Exception):
    """Raised for an image that cannot be used; the message is the reason."""
