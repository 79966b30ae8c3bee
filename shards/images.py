"""The one rule for images.

1. What decodes cleanly as a baseline or progressive, grey or three-component JPEG is kept byte for byte.
2. What decodes otherwise, or only with warnings, is re-encoded as such a JPEG of high quality.
3. What does not decode, or is unreasonably large when decoded, is rejected.

EXIF orientation is recorded, and otherwise left alone. Of animations the first frame counts; transparency is laid on
white; 16-bit samples keep their upper 8 bits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from shards.jpeg import JpegHeader, NotAJpeg, parse_header

FORMATS = ("JPEG", "PNG", "BMP", "GIF", TiffImagePlugin.TiffImageFile.format, WebPImagePlugin.WebPImageFile.format)
REPAIR_QUALITY = 95
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_500  # of a JPEG, in libjpeg
MAX_ENCODED = 512 * 2**20
_ORIENTATION_TAG = 0x0112

# The whole stream is entropy-decoded, which is where damage shows; reconstructing every eighth pixel of the luminance
# spares most of the rest of the work.
_CHECK = {"colorspace": "GRAY", "min_height": 1, "min_width": 1, "min_factor": 8}


class Rejected(Exception):
    """The image cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What may be done to an image. All of it changes the bytes of the set."""

    check: Literal["decode", "header"] = "decode"
    """decode: decode every image. header: trust what the header says (fast, and training may meet damaged images)."""
    max_side: int | None = None
    """Shrink images whose longer side is above this many pixels."""
    short_side: int | None = None
    """Shrink images whose shorter side is above this many pixels."""
    quality: int = 90
    """JPEG quality of images that are shrunk."""

    @property
    def resizes(self) -> bool:
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


def accept(data: bytes, rules: ImageRules) -> Accepted:
    """Apply the rule to one encoded image.

    Raises:
        Rejected: it cannot be used.
    """
    if not data:
        raise Rejected("empty file")
    repair = None
    try:
        header = parse_header(data)
    except NotAJpeg as error:
        header, repair = None, f"JPEG: {error}" if data[:2] == b"\xff\xd8" else "not a JPEG"
    if header is not None:
        _check_extent(header.width, header.height)
        repair = _fault(data, header, rules)
    if repair is None and header is not None:
        target = _target_size(header.width, header.height, rules)
        if target is None:
            return Accepted(data, header.height, header.width, header.orientation)
    return _reencode(data, rules, header, repair)


def looks_like_image(start: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is of one of the formats that can be used."""
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )


def _fault(data: bytes, header: JpegHeader, rules: ImageRules) -> str | None:
    """What keeps a JPEG from being used as it is."""
    if header.components == 4:
        return "CMYK JPEG"
    if not header.plain:
        return "unusual JPEG"
    if rules.check == "decode":
        try:
            simplejpeg.decode_jpeg(data, strict=True, **_CHECK)
        except ValueError as error:
            return f"damaged JPEG: {_kind(str(error))}"
    return None


def _kind(warning: str) -> str:
    """A decoder's warning without the figures that differ from file to file, so that like ones count together."""
    return " ".join(word for word in warning.split() if not any(c.isdigit() for c in word)).rstrip(":")


def _reencode(data: bytes, rules: ImageRules, header: JpegHeader | None, repair: str | None) -> Accepted:
    with _decoding():
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_extent(*opened.size)
        orientation = header.orientation if header else _exif_orientation(opened)
        if opened.format not in ("JPEG", "MPO"):
            repair = str(opened.format)
        image = _plain(opened)
    target = _target_size(*image.size, rules)
    if target is not None:
        image = image.resize(target, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation != 1:
        exif[_ORIENTATION_TAG] = orientation
    quality, subsampling = (REPAIR_QUALITY, "4:4:4") if target is None else (rules.quality, "4:2:0")
    image.save(out, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    return Accepted(out.getvalue(), image.height, image.width, orientation, repair)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever goes wrong in a decoder means that the image does not decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(f"unreasonably large: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else f"does not decode: {error}"
        raise Rejected(reason) from error


def _plain(image: Image.Image) -> Image.Image:
    """Mode L or RGB."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("L", "1"):
        return image.convert("L")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _exif_orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_extent(width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise Rejected("no pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Rejected(f"unreasonably large: {width}x{height} pixels")


def _target_size(width: int, height: int, rules: ImageRules) -> tuple[int, int] | None:
    """Width and height after shrinking; None when the image stays as large as it is."""
    scale = 1.0
    if rules.max_side is not None:
        scale = min(scale, rules.max_side / max(width, height))
    if rules.short_side is not None:
        scale = min(scale, rules.short_side / min(width, height))
    if scale == 1.0:
        return None
    return max(1, round(width * scale)), max(1, round(height * scale))
