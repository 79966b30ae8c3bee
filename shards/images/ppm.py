"""PPM files (netpbm's P6), in which tars store pixels. Only one form of the header is used, without comments."""

from __future__ import annotations

import re

import numpy as np

from shards.images.header_checks import check_extent
from shards.images.pixels import is_blank
from shards.images.rules import Accepted

_HEADER = re.compile(rb"P6\n([1-9][0-9]{0,4}) ([1-9][0-9]{0,4})\n255\n")


def ppm_header(height: int, width: int) -> bytes:
    """Return the header of a PPM; uint8 [height, width, 3], RGB, follows it."""
    return b"P6\n%d %d\n255\n" % (width, height)


def accept_ppm(data: bytes) -> Accepted | None:
    """Return the pixels of a PPM with the header of `ppm_header`; None for any other data.

    Raises:
        Rejected: the image exceeds a limit.
    """
    found = _HEADER.match(data)
    if found is None:
        return None
    width, height = int(found[1]), int(found[2])
    if len(data) != found.end() + 3 * height * width:
        return None
    check_extent(width, height)
    pixels = np.frombuffer(data, np.uint8, offset=found.end()).reshape(height, width, 3)
    return Accepted(data[found.end() :], height, width, 1, blank=is_blank(pixels[::8, ::8]))
