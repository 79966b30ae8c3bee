"""Hold images that are not kept as they are to the limits of `shards.images.limits`, by what their headers say."""

from __future__ import annotations

import re

from PIL import Image, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from shards.images.formats import J2K_CODESTREAM, JP2_CONTAINER
from shards.images.header_size import boxes, isobmff_size, jpeg2000_size, jxl_size, webp_size
from shards.images.jpeg import JpegHeader, NotAJpeg, parse_header
from shards.images.limits import (
    MAX_BOXES,
    MAX_CHUNKS,
    MAX_DECODE_MEMORY,
    MAX_METADATA,
    MAX_PIXELS,
    MAX_PNM_HEADER,
    MAX_PYTHON_SAMPLES,
    MAX_RUN_LENGTH_BMP,
    MAX_SCAN_PIXELS,
    MAX_SHRUNK_PIXELS,
    MAX_SIDE,
    MAX_STRIPS,
)
from shards.images.rules import Rejected
from shards.images.tiff import count_strips

_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325  # TIFF tags
_SUBFILE_TYPE, _SUB_IMAGES, _DNG_VERSION = 254, 330, 50706
_TIFF_JPEG = (6, 7)  # of the compression tag
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # per pixel in Pillow; 4 in other modes
SHRINK_BYTES = 9
"""Per pixel: decoded, resized along its rows, and along its columns."""
_WEBP_BYTES = 23  # per pixel: two canvases of libwebp, its pixels, the frame as bytes, Pillow's pixels, and a copy
# Per pixel, measured with RGBA: planes of the decoder, its pixels, Pillow's, and a copy.
_DECODER_BYTES = {"AVIF": 24, "HEIF": 24, "JXL": 24, "QOI": 16, "PPM": 24}
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER = re.compile(rb"P([1-6])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)(?:" + _GAP + rb"(\d+))?\s")


def check_extent(width: int, height: int, *, shrinks: bool = False) -> None:
    """Check the number of pixels.

    Args:
        shrinks: the image is made smaller, so that its sides may be longer than those of an image of a set.

    Raises:
        Rejected: they are none, or too many.
    """
    if width == 0 or height == 0:
        raise Rejected("no pixels")
    if width * height > MAX_PIXELS:
        raise too_many_pixels(f"{width}x{height}")
    if max(width, height) > MAX_SIDE and not shrinks:
        raise Rejected(
            f"unreasonably large: {width}x{height} pixels, more than {MAX_SIDE:,} per side; --max-side shrinks it"
        )


def too_many_pixels(found: str) -> Rejected:
    """The error of an image above the limit, with what can be done.

    Args:
        found: its number of pixels, or width and height.
    """
    return Rejected(
        f"unreasonably large: {found} pixels, more than {MAX_PIXELS // 10**6} million; shrink it first "
        f"(--max-side does so for JPEGs of up to {MAX_SHRUNK_PIXELS // 10**6:,} million)"
    )


def check_scaled(data: bytes, header: JpegHeader, scale: int) -> None:
    """Check a JPEG of more than `MAX_PIXELS` that is decoded to 1 / `scale` of its sides.

    Raises:
        Rejected: it is too large even so.
    """
    width, height = header.width, header.height
    pixels = width * height
    if pixels > MAX_SHRUNK_PIXELS:
        raise Rejected(
            f"unreasonably large: {width}x{height} pixels, more than the {MAX_SHRUNK_PIXELS // 10**6:,} million of a "
            "JPEG that can be shrunk"
        )
    small = pixels // scale**2
    coefficients = 2 * header.components * pixels if header.multiscan else 0
    memory = SHRINK_BYTES * small + coefficients + len(data)
    if memory > MAX_DECODE_MEMORY:
        raise Rejected(
            f"unreasonably large: shrinking {'a progressive' if header.multiscan else 'a'} JPEG of {width}x{height} "
            f"pixels takes about {memory >> 20} MiB, more than {MAX_DECODE_MEMORY >> 20}"
            + ("" if header.multiscan else "; a smaller --max-side takes less")
        )


def check_before_opening(data: bytes, *, shrinks: bool) -> None:
    """Refuse what Pillow's parsers, which are written in Python, would take long for or much memory.

    Args:
        shrinks: the image is made smaller.

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
    elif data[:1] == b"P" and data[1:2] in b"0123456fy":
        _check_pnm(data)
    elif (strips := count_strips(data)) > MAX_STRIPS:
        raise Rejected(f"unreasonable TIFF: {strips} strips or tiles")
    else:
        _check_canvas(data, shrinks)


def check_before_decoding(opened: Image.Image, data: bytes, shrinks: bool) -> None:
    """Check what the header promises.

    Raises:
        Rejected: the pixels are too many, or their decoding takes too much memory or time.
    """
    width, height = opened.size
    if opened.format in ("WEBP", "JXL", "JPEG2000"):
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
    elif opened.format == "QOI":
        _check_samples("QOI", width * height)
    per_pixel = max(per_pixel, _DECODER_BYTES.get(str(opened.format), 0), SHRINK_BYTES if shrinks else 0)
    _check_memory(str(opened.format), opened.size, per_pixel, buffers + len(data), shrinks=shrinks)


def _check_memory(kind: str, size: tuple[int, int], per_pixel: int, more: int, *, shrinks: bool) -> None:
    width, height = size
    check_extent(width, height, shrinks=shrinks)
    memory = width * height * per_pixel + more
    if memory > MAX_DECODE_MEMORY:
        raise Rejected(
            f"unreasonably large: decoding a {kind} of {width}x{height} pixels takes about "
            f"{memory >> 20} MiB, more than {MAX_DECODE_MEMORY >> 20}"
        )


def _check_canvas(data: bytes, shrinks: bool) -> None:
    """Check formats whose decoders reserve memory when they are opened, or whose headers have several sizes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":  # Pillow reserves two canvases when it opens one
        _check_memory("WebP", webp_size(data), _WEBP_BYTES, len(data), shrinks=shrinks)
    elif (canvas := jxl_size(data)) is not None:  # decoded when it is opened
        _check_memory("JPEG XL", canvas, _DECODER_BYTES["JXL"], len(data), shrinks=shrinks)
    elif data.startswith((J2K_CODESTREAM, JP2_CONTAINER)):
        _check_jpeg2000(data, shrinks)
    elif data[4:8] == b"ftyp":
        if len(boxes(data)) > MAX_BOXES:
            raise Rejected(f"unreasonable image: more than {MAX_BOXES:,} boxes")
        if (stated := isobmff_size(data)) != (0, 0):
            _check_memory("HEIF or AVIF", stated, _DECODER_BYTES["HEIF"], len(data), shrinks=shrinks)


def _check_jpeg2000(data: bytes, shrinks: bool) -> None:
    found = jpeg2000_size(data)
    if found is None:
        raise Rejected("does not decode: a JPEG 2000 without a codestream")
    size, components = found
    # Integers of 32 bits, the codestream's pixels and Pillow's; measured.
    _check_memory("JPEG 2000", size, 7 * components + 6, len(data), shrinks=shrinks)
    if len(boxes(data)) > MAX_BOXES:
        raise Rejected(f"unreasonable JPEG 2000: more than {MAX_BOXES:,} boxes")
    at = data.find(J2K_CODESTREAM) + 2
    for _ in range(MAX_BOXES):  # marker segments of the main header, up to the first tile
        if at + 4 > len(data) or data[at + 1] in (0x90, 0xD9):
            return
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    raise Rejected(f"unreasonable JPEG 2000: more than {MAX_BOXES:,} segments before its first tile")


def _check_pnm(data: bytes) -> None:
    header = _PNM_HEADER.match(data[:MAX_PNM_HEADER])
    if header is None:
        if data[:2] in (b"P0", b"Pf", b"Py"):  # Pillow's own, and floating-point ones: without comments
            return
        raise Rejected(f"does not decode: a PNM without a header in its first {MAX_PNM_HEADER >> 10} KiB")
    kind, width, height, largest = (int(number or 0) for number in header.groups())
    if kind <= 3:
        _check_samples("plain PNM", len(data) // 4)  # three digits and a space
    elif kind > 4 and largest != 255 and (kind, largest) != (5, 65535):
        _check_samples("PNM", width * height * (3 if kind == 6 else 1))


def _check_samples(kind: str, samples: int) -> None:
    if samples > MAX_PYTHON_SAMPLES:
        raise Rejected(
            f"unreasonably large: {kind} of {samples:,} samples that would be decoded in Python, more than "
            f"{MAX_PYTHON_SAMPLES:,}; convert it to PNG first"
        )


def _check_strips(opened: TiffImagePlugin.TiffImageFile, data: bytes) -> int:
    """Return the bytes of the buffers that libtiff needs for a strip or tile.

    Raises:
        Rejected: JPEG-compressed strips have more scans than can be decoded in reasonable time; or it is a camera's raw
            file, whose first image is a preview.
    """
    tags = opened.tag_v2
    if _DNG_VERSION in tags or (_SUB_IMAGES in tags and int(tags.get(_SUBFILE_TYPE, 0)) & 1):
        raise Rejected("a camera's raw file, of which only a small preview would be read; convert it to TIFF or JPEG")
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
