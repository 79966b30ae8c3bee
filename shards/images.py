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

from shards.jpeg import EXIF_SEGMENT, JpegHeader, NotAJpeg, parse_header, with_segment

FORMATS = ("JPEG", "PNG", "BMP", "GIF", TiffImagePlugin.TiffImageFile.format, WebPImagePlugin.WebPImageFile.format)
REPAIR_QUALITY = 95
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_500  # of a JPEG, in libjpeg
MAX_ENCODED = 512 * 2**20
_ORIENTATION_TAG = 0x0112
_FILTER = Image.Resampling.HAMMING  # antialiased; made for shrinking: as quick as bilinear, as sharp as bicubic

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
    try:
        header = parse_header(data)
    except NotAJpeg as error:
        return _repair(data, rules, 1, f"damaged JPEG: {error}" if data[:2] == b"\xff\xd8" else "not a JPEG")
    _check_extent(header.width, header.height)
    fault = "CMYK JPEG" if header.components == 4 else "unusual JPEG"
    if header.plain:
        try:
            return _take(data, rules, header)
        except ValueError as error:
            fault = f"damaged JPEG: {_kind(str(error))}"
    return _repair(data, rules, header.orientation, fault)


def looks_like_image(start: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is of one of the formats that can be used."""
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )


def _take(data: bytes, rules: ImageRules, header: JpegHeader) -> Accepted:
    """A plain JPEG, as it is or shrunk.

    Raises:
        ValueError: the decoder complains.
    """
    target = _target_size(header.width, header.height, rules)
    if target is None:
        if rules.check == "decode":
            simplejpeg.decode_jpeg(data, strict=True, **_CHECK)
        return Accepted(data, header.height, header.width, header.orientation)
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if header.components == 1 else "RGB", strict=True)
    shrunk = Image.fromarray(pixels.squeeze(axis=2) if header.components == 1 else pixels).resize(target, _FILTER)
    return _encode(shrunk, rules.quality, "420", header.orientation, None)


def _kind(warning: str) -> str:
    """A decoder's warning without the figures that differ from file to file, so that like ones count together."""
    return " ".join(word for word in warning.split() if not any(c.isdigit() for c in word)).rstrip(":")


def _repair(data: bytes, rules: ImageRules, orientation: int, fault: str) -> Accepted:
    """Whatever else Pillow can decode, as a plain JPEG."""
    with _decoding():
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_extent(*opened.size)
        if opened.format not in ("JPEG", "MPO"):
            fault, orientation = str(opened.format), _exif_orientation(opened)
        image = _plain(opened)
    target = _target_size(*image.size, rules)
    if target is not None:
        return _encode(image.resize(target, _FILTER), rules.quality, "420", orientation, fault)
    return _encode(image, REPAIR_QUALITY, "444", orientation, fault)


def _encode(image: Image.Image, quality: int, subsampling: str, orientation: int, repair: str | None) -> Accepted:
    pixels = np.asarray(image)
    if image.mode == "L":
        data = simplejpeg.encode_jpeg(pixels[:, :, None], quality, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = orientation
        data = with_segment(data, EXIF_SEGMENT, exif.tobytes())
    return Accepted(data, image.height, image.width, orientation, repair)


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
    if image.mode == "F":
        raise Rejected("floating-point samples")
    if image.mode.startswith("I"):
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
