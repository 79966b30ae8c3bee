"""Decide whether an image is kept, re-encoded, or rejected.

1. A standard JPEG (baseline or progressive, 8 bits, grayscale or three components) that decodes without warnings is
   kept byte for byte.
2. Any other image that decodes is re-encoded as a standard JPEG of high quality.
3. An image that does not decode, or that exceeds a limit of `shards.images.limits`, is rejected.

With `ImageRules.pixels`, the pixels of the images of 1 and 2 are stored instead of JPEGs.

The EXIF orientation is recorded but not applied. Only the first frame of an animation is used. `shards.images.pixels`
converts pixels that are not 8-bit grayscale or RGB.
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
from shards.images.pixels import Pixels, is_blank, profile_of, to_8bit, to_srgb
from shards.images.rules import Accepted, ImageRules, Rejected
from shards.images.shrink import shrink, target_size
from shards.images.tiff import has_second_page

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one thread suffices, because there is one worker per core
REPAIR_QUALITY = 95
_BYTES_LEFT = re.compile(r" \(\d+ bytes not processed\)")
_ORIENTATION_TAG = 0x0112

# The entire stream is entropy-decoded, which detects damage. Reconstructing only every eighth pixel of the luminance
# avoids most of the remaining work.
_CHECK = {"colorspace": "GRAY", "min_height": 1, "min_width": 1, "min_factor": 8}
_SCALES = (8, 4, 2)  # integer factors of libjpeg's scaled decoding


def accept(data: bytes, rules: ImageRules) -> Accepted:
    """Return what to store for one encoded image.

    Raises:
        Rejected: the image cannot be used.
    """
    if not data:
        raise Rejected("empty file")
    if len(data) > MAX_ENCODED:
        raise Rejected(f"too large: {len(data)} bytes, more than {MAX_ENCODED >> 20} MiB")
    try:
        header = parse_header(data)
    except HeaderTooLong as error:
        raise Rejected(f"JPEG with {error}") from error
    except NotAJpeg as error:
        return _reencode(data, rules, 1, f"damaged JPEG: {error}" if data[:2] == b"\xff\xd8" else "not a JPEG")
    target = target_size(header.width, header.height, rules)
    if header.is_standard and target is not None and header.width * header.height > MAX_PIXELS:
        return _shrink_giant(data, rules, header, target)
    check_extent(header.width, header.height, shrinks=target is not None)
    many_scans = _check_scans(data, header)
    fault = "CMYK JPEG" if header.components == 4 else "non-standard JPEG"
    if many_scans:
        fault = f"JPEG with more than {MAX_SCANS} scans"
    elif header.is_standard:
        try:
            return _keep_or_shrink(data, rules, header)
        except ValueError as error:
            if "memory" in str(error).lower():  # libjpeg's "Insufficient memory" does not mean a damaged image
                raise MemoryError(str(error)) from error
            fault = f"damaged JPEG: {_without_numbers(str(error))}"
    return _reencode(data, rules, header.orientation, fault)


def stored_size(data: bytes, rules: ImageRules) -> tuple[int, int] | None:
    """Return the (width, height) with which an image will be stored, from its header; None if it has no valid header.

    TIFFs may be stored with their sides exchanged.
    """
    try:
        header = parse_header(data)
        size = header.width, header.height
    except NotAJpeg:
        try:
            with _decoding(), _open(data, rules) as opened:
                size = opened.size
        except Rejected:
            return None
    return target_size(*size, rules) or size


def exceeded_limit(data: bytes) -> str | None:
    """Return the limit that a JPEG of a shard set exceeds according to its header; None if there is none."""
    try:
        header = parse_header(data)
        check_extent(header.width, header.height)
        return f"more than {MAX_SCANS} scans" if _check_scans(data, header) else None
    except (NotAJpeg, Rejected) as error:
        return str(error)


def _keep_or_shrink(data: bytes, rules: ImageRules, header: JpegHeader) -> Accepted:
    """Return a standard JPEG unchanged, or its pixels or a shrunk JPEG if the rules require it.

    Raises:
        ValueError: the decoder reports an error or a warning.
    """
    target = target_size(header.width, header.height, rules)
    if target is None and not rules.pixels:
        if rules.check == "decode":
            blank = is_blank(simplejpeg.decode_jpeg(data, strict=True, **_CHECK))
            return Accepted(data, header.height, header.width, header.orientation, blank=blank)
        return Accepted(data, header.height, header.width, header.orientation)
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if header.components == 1 else "RGB", strict=True)
    if target is None:
        return _encode(pixels, rules, header.orientation, None)
    return _encode_shrunk(data, pixels, header, target, rules)


def _shrink_giant(data: bytes, rules: ImageRules, header: JpegHeader, target: tuple[int, int]) -> Accepted:
    """Shrink a standard JPEG of more than `MAX_PIXELS` while it is decoded.

    Raises:
        Rejected: it is damaged, or too large even for scaled decoding.
    """
    _check_scans(data, header)
    sides = (header.width, header.height)
    scale = next((scale for scale in _SCALES if all(map(_is_large_enough, sides, target, [scale] * 2))), 1)
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
            f"damaged JPEG of {header.width}x{header.height} pixels, too large to re-encode: "
            f"{_without_numbers(str(error))}"
        ) from error
    return _encode_shrunk(data, pixels, header, target, rules)


def _is_large_enough(side: int, wanted: int, scale: int) -> bool:
    return -(-side // scale) >= wanted


def _encode_shrunk(
    data: bytes, pixels: Pixels, header: JpegHeader, target: tuple[int, int], rules: ImageRules
) -> Accepted:
    shrunk = shrink(pixels, target, rules)
    if header.components == 3 and has_profile(data, header):  # the shrunk JPEG is stored without a profile
        with suppress(Exception), Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
            shrunk = to_srgb(shrunk, profile_of(opened))
    return _encode(shrunk, rules, header.orientation, None, shrunk=True)


def _without_numbers(warning: str) -> str:
    """Remove words with digits from a decoder's warning, so that equal warnings are counted together."""
    return " ".join(word for word in warning.split() if not any(c.isdigit() for c in word)).rstrip(":")


def _reencode(data: bytes, rules: ImageRules, orientation: int, fault: str) -> Accepted:
    """Decode an image with Pillow and encode it as a standard JPEG, or return its pixels."""
    with _decoding():
        opened = _open(data, rules)
        check_before_decoding(opened, data, shrinks=target_size(*opened.size, rules) is not None)
        opened.load()
        if opened.format not in ("JPEG", "MPO"):
            # Read the orientation after loading: Pillow applies a TIFF's orientation to its pixels and removes the tag.
            fault, orientation = str(opened.format), _exif_orientation(opened)
            fault += " with several pages, only the first page used" if has_second_page(data) else ""
        pixels, notes = to_8bit(opened, data)
        fault = ": ".join([fault, *notes])
        del opened  # frees Pillow's pixels, which may need more memory than the converted pixels
    height, width = pixels.shape[:2]
    target = target_size(width, height, rules)
    if target is not None:
        return _encode(shrink(pixels, target, rules), rules, orientation, fault, shrunk=True)
    check_extent(width, height)
    return _encode(pixels, rules, orientation, fault)


def _open(data: bytes, rules: ImageRules) -> Image.Image:
    """Open an image with Pillow, which reads its header only."""
    check_before_opening(data, shrinks=rules.shrinks)
    other = load_optional_decoder(data)
    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS if other is None else [other])


def _encode(
    pixels: Pixels, rules: ImageRules, orientation: int, repair: str | None, *, shrunk: bool = False
) -> Accepted:
    """Return the JPEG, or the RGB pixels, of uint8 [H, W, 1 or 3]."""
    height, width, channels = pixels.shape
    blank = is_blank(pixels[::8, ::8])
    if rules.pixels:
        rgb = pixels if channels == 3 else np.repeat(pixels, 3, axis=2)
        return Accepted(rgb.tobytes(), height, width, orientation, repair, blank)
    # Shrunk images get the chroma subsampling of nearly all photos: 4:4:4 takes 21 % more bytes.
    quality, subsampling = (rules.quality, "420") if shrunk else (REPAIR_QUALITY, "444")
    if channels == 1:
        data = simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = orientation
        data = with_segment(data, EXIF_SEGMENT, exif.tobytes())
    return Accepted(data, height, width, orientation, repair, blank)


@contextmanager
def _decoding() -> Iterator[None]:
    """Convert every error of a decoder, except lack of memory, to `Rejected`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        # Pillow raises this error above twice `MAX_PIXELS`; the message contains the number of pixels.
        found = re.search(r"\d+", str(error))
        raise too_many_pixels(found[0] if found else "too many") from error
    except OSError as error:
        if str(error).startswith("out of memory"):  # Pillow's decoders report lack of memory as OSError
            raise MemoryError(str(error)) from error
        raise Rejected(_reason(error)) from error
    except Exception as error:  # Pillow's decoders raise exceptions of any type on damaged data
        raise Rejected(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    # Pillow counts the bytes that are left, which would give every truncated file a reason of its own.
    return f"does not decode: {_BYTES_LEFT.sub('', first_line(error))}"


def _exif_orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_scans(data: bytes, header: JpegHeader) -> bool:
    """Return whether a JPEG has more scans than `MAX_SCANS`, so that it has to be re-encoded.

    Raises:
        Rejected: it has more scans than can be decoded in reasonable time.
    """
    most = min(MAX_SCAN_PIXELS // (header.width * header.height), MAX_SEGMENTS)
    scans = count_scans(data, header, most)
    if scans > most:
        raise Rejected(f"JPEG with more than {most} scans of {header.width}x{header.height} pixels")
    return scans > MAX_SCANS
