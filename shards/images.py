"""The one rule for images.

1. What decodes cleanly as a baseline or progressive, grey or three-component JPEG is kept byte for byte.
2. What decodes otherwise, or only with warnings, is re-encoded as such a JPEG of high quality.
3. What does not decode, or exceeds one of the limits of `shards.limits`, is rejected.

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
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, WebPImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from shards.jpeg import EXIF_SEGMENT, HeaderTooLong, JpegHeader, NotAJpeg, count_scans, parse_header, with_segment
from shards.limits import (
    MAX_CHUNKS,
    MAX_DECODE_MEMORY,
    MAX_ENCODED,
    MAX_METADATA,
    MAX_PIXELS,
    MAX_RUN_LENGTH_BMP,
    MAX_SCAN_PIXELS,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_SIDE,
    MAX_STRIPS,
)
from shards.tiff import count_strips

FORMATS = ("JPEG", "PNG", "BMP", "GIF", TiffImagePlugin.TiffImageFile.format, WebPImagePlugin.WebPImageFile.format)
REPAIR_QUALITY = 95
BAND_PIXELS = 2**20  # converted at a time, so that conversions need no second copy of a large image
_ORIENTATION_TAG = 0x0112
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325  # TIFF tags
_TIFF_JPEG = (6, 7)  # of the compression tag
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # per pixel in Pillow; 4 in other modes
_SHRINK_BYTES = 9  # per pixel: decoded, resized along its rows, and along its columns
_WEBP_BYTES = 23  # per pixel: two canvases of libwebp, its pixels, the frame as bytes, Pillow's pixels, and a copy
_FILTER = Image.Resampling.HAMMING  # antialiased; made for shrinking: as quick as bilinear, as sharp as bicubic

# The whole stream is entropy-decoded, which is where damage shows; reconstructing every eighth pixel of the luminance
# spares most of the rest of the work.
_CHECK = {"colorspace": "GRAY", "min_height": 1, "min_width": 1, "min_factor": 8}
_BLANK_PIXELS = 16  # of a reduced image: 32x32 pixels
_BLACK = 20  # of 255: highest value of an image that is nearly black
_ONE_COLOUR = 3  # of 255: range of values of an image of a single colour


Pixels = NDArray[np.uint8]
"""uint8 [H, W, C], C = 1 (grey) or 3 (RGB)."""


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
    blank: bool = False
    """Nearly black or of a single colour; not known where the header is trusted."""


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
    _check_extent(header.width, header.height)
    many_scans = _check_scans(data, header)
    fault = "CMYK JPEG" if header.components == 4 else "unusual JPEG"
    if many_scans:
        fault = f"JPEG of more than {MAX_SCANS} scans"
    elif header.plain:
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
        _check_extent(header.width, header.height)
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
    return _encode(_shrink(pixels, target), rules.quality, "420", header.orientation, None)


def _kind(warning: str) -> str:
    """A decoder's warning without the figures that differ from file to file, so that like ones count together."""
    return " ".join(word for word in warning.split() if not any(c.isdigit() for c in word)).rstrip(":")


def _repair(data: bytes, rules: ImageRules, orientation: int, fault: str) -> Accepted:
    """Whatever else Pillow can decode, as a plain JPEG."""
    with _decoding():
        _check_before_opening(data)
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_extent(*opened.size)
        _check_before_decoding(opened, data, shrinks=_target_size(*opened.size, rules) is not None)
        opened.load()
        if opened.format not in ("JPEG", "MPO"):
            # After loading, because Pillow applies a TIFF's orientation to its pixels by itself, and removes the tag.
            fault, orientation = str(opened.format), _exif_orientation(opened)
        pixels = _plain(opened)
        del opened  # its pixels are the larger copy
    height, width = pixels.shape[:2]
    target = _target_size(width, height, rules)
    if target is not None:
        return _encode(_shrink(pixels, target), rules.quality, "420", orientation, fault)
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
        raise Rejected(f"unreasonably large: {error}") from error
    except OSError as error:
        if str(error).startswith("out of memory"):  # Pillow's code for it
            raise MemoryError(str(error)) from error
        raise Rejected(_reason(error)) from error
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        raise Rejected(_reason(error)) from error


def _reason(error: Exception) -> str:
    return "no image" if isinstance(error, Image.UnidentifiedImageError) else f"does not decode: {error}"


def _plain(image: Image.Image) -> Pixels:
    """Grey or RGB, uint8 [H, W, 1 or 3], converted in bands of rows."""
    if image.mode == "F":
        raise Rejected("floating-point samples")
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    if rows >= height:
        return _plain_band(image)
    pixels: Pixels | None = None
    for top in range(0, height, rows):
        band = _plain_band(image.crop((0, top, width, min(top + rows, height))))
        if pixels is None:
            pixels = np.empty((height, width, band.shape[2]), np.uint8)
        pixels[top : top + len(band)] = band
    assert pixels is not None
    return pixels


def _plain_band(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[:, :, None]
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))[:, :, None]
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _exif_orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_extent(width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise Rejected("no pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Rejected(f"unreasonably large: {width}x{height} pixels")


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


def _check_before_opening(data: bytes) -> None:
    """Refuse what Pillow's parsers, which are written in Python, would take long for or much memory.

    Raises:
        Rejected: one of the limits is exceeded.
    """
    if data[:2] == b"\xff\xd8":  # a damaged header, which Pillow searches byte by byte for markers
        start = data.find(b"\xff\xda")
        if start > MAX_METADATA or (start < 0 and len(data) > MAX_METADATA):
            raise Rejected(f"damaged JPEG: more than {MAX_METADATA >> 20} MiB before its first scan")
    elif data[:4] == b"\x89PNG":
        at = 8
        for _ in range(MAX_CHUNKS):
            if at >= len(data):
                return
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        raise Rejected(f"unreasonable PNG: more than {MAX_CHUNKS:,} chunks")
    elif data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(data) > MAX_RUN_LENGTH_BMP:
        raise Rejected(f"unreasonably large: a run-length encoded BMP of {len(data)} bytes")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":  # Pillow reserves two canvases when it opens one
        _check_memory("WebP", *_webp_size(data), _WEBP_BYTES, len(data))
    elif (strips := count_strips(data)) > MAX_STRIPS:
        raise Rejected(f"unreasonable TIFF: {strips} strips or tiles")


def _check_before_decoding(opened: Image.Image, data: bytes, shrinks: bool) -> None:
    """Check what the header promises.

    Raises:
        Rejected: the pixels are too many, or their decoding takes too much memory or time.
    """
    width, height = opened.size
    if opened.format == WebPImagePlugin.WebPImageFile.format:
        return  # checked before it was opened
    per_pixel = _STORED_BYTES.get(opened.mode, 4) + (1 if opened.mode in ("1", "L") or opened.mode[0] == "I" else 3)
    buffers = 0
    if isinstance(opened, JpegImageFile):
        try:
            multiscan = parse_header(data).multiscan
        except NotAJpeg:  # of a damaged header, Pillow may make something else: search the whole file for scans
            multiscan = True
            scans = data.count(b"\xff\xda")
            if scans * width * height > MAX_SCAN_PIXELS:
                raise Rejected(
                    f"damaged JPEG: no whole header, and up to {scans} scans of {width}x{height} pixels"
                ) from None
        if multiscan:
            per_pixel += 2 * opened.layers  # coefficients
    elif isinstance(opened, TiffImagePlugin.TiffImageFile):
        buffers = _check_strips(opened, data)
    per_pixel = max(per_pixel, _SHRINK_BYTES if shrinks else 0)
    _check_memory(str(opened.format), width, height, per_pixel, buffers + len(data))


def _check_memory(kind: str, width: int, height: int, per_pixel: int, more: int) -> None:
    _check_extent(width, height)
    memory = width * height * per_pixel + more
    if memory > MAX_DECODE_MEMORY:
        raise Rejected(
            f"unreasonably large: decoding a {kind} of {width}x{height} pixels takes about "
            f"{memory >> 20} MiB, more than {MAX_DECODE_MEMORY >> 20}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649, sections 2.5 to 2.7)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_strips(opened: TiffImagePlugin.TiffImageFile, data: bytes) -> int:
    """Return the bytes of the buffers that libtiff needs for a strip or tile.

    Raises:
        Rejected: JPEG-compressed strips have more scans than can be decoded in reasonable time.
    """
    tags = opened.tag_v2
    width, height = opened.size
    rows = min(int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height)), height)
    strip = int(tags.get(_TILE_WIDTH, width)) * int(tags.get(_TILE_LENGTH, rows))
    if tags.get(TiffImagePlugin.COMPRESSION) in _TIFF_JPEG:
        tiled = _TILE_OFFSETS in tags
        offsets = tags.get(_TILE_OFFSETS if tiled else TiffImagePlugin.STRIPOFFSETS, ())
        counts = tags.get(_TILE_COUNTS if tiled else TiffImagePlugin.STRIPBYTECOUNTS, ())
        if sum(counts) > len(data):
            raise Rejected("unreasonable TIFF: its strips are larger than the file")
        scans = sum(data.count(b"\xff\xda", at, at + n) for at, n in zip(offsets, counts, strict=False))
        if scans * strip > MAX_SCAN_PIXELS:
            raise Rejected(f"unreasonable TIFF: {scans} JPEG scans of {strip} pixels")
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    return strip * max(4, sum(bits) // 8)  # 4: of YCbCr, which libtiff gives as RGBA


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
