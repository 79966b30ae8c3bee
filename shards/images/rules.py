"""What may be done to the images of a set, and the two outcomes: accepted or rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Check = Literal["decode", "header"]


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What may be done to an image. All of it changes the bytes of the set."""

    check: Check = "decode"
    """decode: decode every image. header: trust what the header says (fast, and training may meet damaged images)."""
    max_side: int | None = None
    """Shrink images whose longer side is above this many pixels."""
    short_side: int | None = None
    """Shrink images whose shorter side is above this many pixels."""
    quality: int = 90
    """JPEG quality of images that are shrunk."""

    @property
    def shrinks(self) -> bool:
        """Whether large images are made smaller."""
        return self.max_side is not None or self.short_side is not None


@dataclass(frozen=True)
class Accepted:
    """A JPEG for the set."""

    data: bytes
    height: int
    width: int
    orientation: int
    repair: str | None = None
    """Why it was re-encoded, if what came was no plain JPEG."""
    blank: bool = False
    """Nearly black or of a single colour; not known where the header is trusted."""


class Rejected(Exception):
    """The image cannot be used; the message is the reason."""
