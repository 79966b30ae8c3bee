"""The one rule for images.

1. What decodes cleanly as a baseline or progressive, grey or three-component JPEG is kept byte for byte.
2. What decodes otherwise, or only with warnings, is re-encoded as such a JPEG of high quality.
3. What does not decode, or exceeds one of the limits of `shards.images.limits`, is rejected.

EXIF orientation is recorded, and otherwise left alone. Of animations the first frame counts. `shards.images.pixels`
says what becomes of other pixels than 8-bit grey and RGB.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image

from shards.errors import first_line
from shards.images.formats import PILLOW_FORMATS
from shards.images.header_checks import (
    check_before_decoding,
    check_before_opening,
    check_extent,
    check_scaled,
    too_many_pixels,
)
from shards.images.jpeg import (
    EXIF_SEGMENT,
    HeaderTooLong,
    JpegHeader,
    NotAJpeg,
    count_scans,
    has_profile,
    parse_header,
    with_segment,
)
from shards.images.limits import MAX_ENCODED, MAX_PIXELS, MAX_SCAN_PIXELS, MAX_SCANS, MAX_SEGMENTS
from shards.images.optional_formats import load_optional_decoder
from shards.images.pixels import BAND_PIXELS, Pixels, profile_of, to_8bit, to_srgb
from shards.images.rules import Accepted, ImageRules, Rejected
from shards.images.tiff import has_second_page

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # of one decoder: there is a worker per core
REPAIR_QUALITY = 95
_ORIENTATION_TAG = 0x0112
_FILTER = Image.Resampling.HAMMING  # antialiased; made for shrinking: as quick as bilinear, as sharp as bicubic

# The whole stream is entropy-decoded, which is where damage shows; reconstructing every eighth pixel of the luminance
# spares most of the rest of the work.
_CHECK = {"colorspace": "GRAY", "min_height": 1, "min_width": 1, "min_factor": 8}
_BLANK_PIXELS = 16  # of a reduced image: 32x32 pixels
_BLACK = 20  # of 255: highest value of an image that is nearly black
_ONE_COLOUR = 3  # of 255: range of values of an image of a single colour
_SCALES = (8, 4, 2)  # of libjpeg's scaled decoding, by whole numbers


def accept(data: bytes, rules: ImageRules) -> Accepted:
    """Apply the rule to one encoded image.

    Raises:
        Rejected: it cannot be used.
    """
    if not data:
        raise Rejected("empty file")
    if len(data) > MAX_ENCODED:
        raise Rejected(f"unreasonably large: {len(data)} bytes")
    try:
        header = parse_header(data)
    except HeaderTooLong as error:
        raise Rejected(f"unreasonable JPEG: {error}") from error
    except NotAJpeg as error:
        return _repair(data, rules, 1, f"damaged JPEG: {error}" if data[:2] == b"\xff\xd8" else "not a JPEG")
    target = _target_size(header.width, header.height, rules)
    if header.is_standard and target is not None and header.width * header.height > MAX_PIXELS:
        return _take_giant(data, rules, header, target)
    check_extent(header.width, header.height, shrinks=target is not None)
    many_scans = _check_scans(data, header)
    fault = "CMYK JPEG" if header.components == 4 else "unusual JPEG"
    if many_scans:
        fault = f"JPEG of more than {MAX_SCANS} scans"
    elif header.is_standard:
        try:
            return _take(data, rules, header)
        except ValueError as error:
            if "memory" in str(error).lower():  # libjpeg's "Insufficient memory" says nothing against the image
                raise MemoryError(str(error)) from error
            fault = f"damaged JPEG: {_kind(str(error))}"
    return _repair(data, rules, header.orientation, fault)


def exceeded_limit(data: bytes) -> str | None:
    """Say which limit a JPEG of a set exceeds, by its header; None where it would be kept."""
    try:
        header = parse_header(data)
        check_extent(header.width, header.height)
        return f"more than {MAX_SCANS} scans" if _check_scans(data, header) else None
    except (NotAJpeg, Rejected) as error:
        return str(error)


def _take(data: bytes, rules: ImageRules, header: JpegHeader) -> Accepted:
    """A plain JPEG, as it is or shrunk.

    Raises:
        ValueError: the decoder complains.
    """
    target = _target_size(header.width, header.height, rules)
    if target is None:
        if rules.check == "decode":
            blank = _is_blank(simplejpeg.decode_jpeg(data, strict=True, **_CHECK))
            return Accepted(data, header.height, header.width, header.orientation, blank=blank)
        return Accepted(data, header.height, header.width, header.orientation)
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if header.components == 1 else "RGB", strict=True)
    return _shrunk(data, pixels, header, target, rules)


def _take_giant(data: bytes, rules: ImageRules, header: JpegHeader, target: tuple[int, int]) -> Accepted:
    """A plain JPEG of more than `MAX_PIXELS`, shrunk while it is decoded.

    Raises:
        Rejected: it is damaged, or too large for that.
    """
    _check_scans(data, header)
    scale = next(
        (scale for scale in _SCALES if all(map(_reaches, (header.width, header.height), target, [scale] * 2))), 1
    )
    check_scaled(data, header, scale)
    width, height = -(-header.width // scale), -(-header.height // scale)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "GRAY" if header.components == 1 else "RGB", strict=True, min_width=width, min_height=height
        )
    except ValueError as error:
        if "memory" in str(error).lower():
            raise MemoryError(str(error)) from error
        raise Rejected(
            f"damaged JPEG of {header.width}x{header.height} pixels, more than are repaired: {_kind(str(error))}"
        ) from error
    return _shrunk(data, pixels, header, target, rules)


def _reaches(side: int, wanted: int, scale: int) -> bool:
    return -(-side // scale) >= wanted


def _shrunk(data: bytes, pixels: Pixels, header: JpegHeader, target: tuple[int, int], rules: ImageRules) -> Accepted:
    small = _shrink(pixels, target)
    if header.components == 3 and has_profile(data, header):  # which is not written to the smaller image
        with suppress(Exception), Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
            small = to_srgb(small, profile_of(opened))
    return _encode(small, rules.quality, "420", header.orientation, None)


def _kind(warning: str) -> str:
    """A decoder's warning without the figures that differ from file to file, so that like ones count together."""
    return " ".join(word for word in warning.split() if not any(c.isdigit() for c in word)).rstrip(":")


def _repair(data: bytes, rules: ImageRules, orientation: int, fault: str) -> Accepted:
    """Whatever else Pillow can decode, as a plain JPEG."""
    with _decoding():
        check_before_opening(data, shrinks=rules.shrinks)
        other = load_optional_decoder(data)
        opened = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS if other is None else [other])
        check_before_decoding(opened, data, shrinks=_target_size(*opened.size, rules) is not None)
        opened.load()
        if opened.format not in ("JPEG", "MPO"):
            # After loading, because Pillow applies a TIFF's orientation to its pixels by itself, and removes the tag.
            fault, orientation = str(opened.format), _exif_orientation(opened)
            fault += " of several pages, the first one used" if has_second_page(data) else ""
        pixels, notes = to_8bit(opened, data)
        fault = ": ".join([fault, *notes])
        del opened  # its pixels are the larger copy
    height, width = pixels.shape[:2]
    target = _target_size(width, height, rules)
    if target is not None:
        return _encode(_shrink(pixels, target), rules.quality, "420", orientation, fault)
    check_extent(width, height)
    return _encode(pixels, REPAIR_QUALITY, "444", orientation, fault)


def _shrink(pixels: Pixels, target: tuple[int, int]) -> Pixels:
    """Antialiased; uint8 [H, W, 1 or 3] to the (width, height) of `target`.

    Pillow resizes first along rows and then along columns, with whole numbers in between, so that a large image gives
    the same pixels when it is resized in bands, which takes fewer copies of it.
    """
    (height, width, channels), (new_width, new_height) = pixels.shape, target
    if height * width <= BAND_PIXELS:
        return _resize(pixels, target)
    narrow = np.empty((height, new_width, channels), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = pixels[top : top + rows]
        narrow[top : top + rows] = _resize(band, (new_width, len(band)))
    shrunk = np.empty((new_height, new_width, channels), np.uint8)
    columns = max(1, BAND_PIXELS // height)
    for left in range(0, new_width, columns):
        strip = np.ascontiguousarray(narrow[:, left : left + columns])
        shrunk[:, left : left + columns] = _resize(strip, (strip.shape[1], new_height))
    return shrunk


def _resize(pixels: Pixels, target: tuple[int, int]) -> Pixels:
    grey = pixels.shape[2] == 1
    resized = np.asarray(Image.fromarray(pixels[:, :, 0] if grey else pixels).resize(target, _FILTER))
    return resized[:, :, None] if grey else resized


def _encode(pixels: Pixels, quality: int, subsampling: str, orientation: int, repair: str | None) -> Accepted:
    height, width, channels = pixels.shape
    if channels == 1:
        data = simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = orientation
        data = with_segment(data, EXIF_SEGMENT, exif.tobytes())
    return Accepted(data, height, width, orientation, repair, _is_blank(pixels[::8, ::8]))


def _is_blank(pixels: Pixels) -> bool:
    """Whether an image is nearly black or of a single colour, by every eighth pixel along each side.

    Of very small images that leaves too few to tell.
    """
    if pixels.shape[0] * pixels.shape[1] < _BLANK_PIXELS:
        return False
    highest = pixels.max(axis=(0, 1)).astype(np.int64)
    return bool(highest.max() <= _BLACK or np.all(highest - pixels.min(axis=(0, 1)) <= _ONE_COLOUR))


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
        found = re.search(r"\d+", str(error))  # Pillow's own limit, twice ours, comes first: its text has the number
        raise too_many_pixels(found[0] if found else "too many") from error
    except OSError as error:
        if str(error).startswith("out of memory"):  # Pillow's code for it
            raise MemoryError(str(error)) from error
        raise Rejected(_reason(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        raise Rejected(_reason(error)) from error


def _reason(error: Exception) -> str:
    return "no image" if isinstance(error, Image.UnidentifiedImageError) else f"does not decode: {first_line(error)}"


def _exif_orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_scans(data: bytes, header: JpegHeader) -> bool:
    """Whether the JPEG has more scans than one that is kept may have.

    Raises:
        Rejected: it has more than can be decoded in reasonable time.
    """
    most = min(MAX_SCAN_PIXELS // (header.width * header.height), MAX_SEGMENTS)
    scans = count_scans(data, header, most)
    if scans > most:
        raise Rejected(f"unreasonable JPEG: more than {most} scans of {header.width}x{header.height} pixels")
    return scans > MAX_SCANS


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
