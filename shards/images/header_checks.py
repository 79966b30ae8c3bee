"""Check the headers of images that have to be re-encoded against the limits of `shards.images.limits`."""

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
_TIFF_JPEG = (6, 7)  # values of the compression tag for JPEG
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # mode -> bytes per pixel in Pillow, else 4
SHRINK_BYTES = 9
"""Bytes per pixel for shrinking an image: decoded, resized along rows, and resized along columns."""
# Bytes per pixel of a WebP: libwebp's two canvases and pixels, the frame as bytes, Pillow's pixels, and a copy.
_WEBP_BYTES = 23
# Format -> bytes per pixel, measured with RGBA: the decoder's planes and pixels, Pillow's pixels, and a copy.
_DECODER_BYTES = {"AVIF": 24, "HEIF": 24, "JXL": 24, "QOI": 16, "PPM": 24}
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER = re.compile(rb"P([1-6])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)(?:" + _GAP + rb"(\d+))?\s")


def check_extent(width: int, height: int, *, shrinks: bool = False) -> None:
    """Check the number of pixels.

    Args:
        shrinks: whether the image is shrunk, so that its sides may exceed `MAX_SIDE`.

    Raises:
        Rejected: the image has no pixels, or too many.
    """
    if width == 0 or height == 0:
        raise Rejected("the width or height is 0")
    if width * height > MAX_PIXELS:
        raise too_many_pixels(f"{width}x{height}")
    if max(width, height) > MAX_SIDE and not shrinks:
        raise Rejected(
            f"too large: {width}x{height} pixels; at most {MAX_SIDE:,} per side are allowed; --max-side shrinks it"
        )


def too_many_pixels(found: str) -> Rejected:
    """Return the error for an image of more than `MAX_PIXELS`.

    Args:
        found: number of its pixels, or width and height.
    """
    return Rejected(
        f"too large: {found} pixels, at most {MAX_PIXELS // 10**6} million are allowed; shrink it first (--max-side "
        f"can shrink JPEGs of up to {MAX_SHRUNK_PIXELS // 10**6:,} million pixels)"
    )


def check_scaled(data: bytes, header: JpegHeader, scale: int) -> None:
    """Check a JPEG of more than `MAX_PIXELS` that is decoded with its sides divided by `scale`.

    Raises:
        Rejected: it is too large for scaled decoding.
    """
    width, height = header.width, header.height
    pixels = width * height
    if pixels > MAX_SHRUNK_PIXELS:
        raise Rejected(
            f"too large: {width}x{height} pixels; JPEGs of at most {MAX_SHRUNK_PIXELS // 10**6:,} million pixels can "
            "be shrunk"
        )
    small = pixels // scale**2
    coefficients = 2 * header.components * pixels if header.multiscan else 0
    memory = SHRINK_BYTES * small + coefficients + len(data)
    if memory > MAX_DECODE_MEMORY:
        raise Rejected(
            f"too large: shrinking {'a progressive' if header.multiscan else 'a'} JPEG of {width}x{height} pixels "
            f"needs about {memory >> 20} MiB of memory; at most {MAX_DECODE_MEMORY >> 20} are allowed"
            + ("" if header.multiscan else "; a smaller --max-side needs less")
        )


def check_before_opening(data: bytes, *, shrinks: bool) -> None:
    """Reject images that would cost Pillow's parsers, which are written in Python, much time or memory.

    Args:
        shrinks: whether the image is shrunk.

    Raises:
        Rejected: one of the limits is exceeded.
    """
    if data[:2] == b"\xff\xd8":  # a damaged JPEG, which Pillow searches byte by byte for markers
        start = data.find(b"\xff\xda")
        if start > MAX_METADATA or (start < 0 and len(data) > MAX_METADATA):
            raise Rejected(f"damaged JPEG: more than {MAX_METADATA >> 20} MiB before the first scan")
    elif data[:4] == b"\x89PNG":
        at = 8
        for _ in range(MAX_CHUNKS):
            if at >= len(data):
                return
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        raise Rejected(f"PNG with more than {MAX_CHUNKS:,} chunks")
    elif data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(data) > MAX_RUN_LENGTH_BMP:
        raise Rejected(
            f"run-length encoded BMP of {len(data)} bytes; at most {MAX_RUN_LENGTH_BMP >> 20} MiB are allowed"
        )
    elif data[:1] == b"P" and data[1:2] in b"0123456fy":
        _check_pnm(data)
    elif (strips := count_strips(data)) > MAX_STRIPS:
        raise Rejected(f"TIFF with {strips} strips or tiles; at most {MAX_STRIPS:,} are allowed")
    else:
        _check_canvas(data, shrinks)


def check_before_decoding(opened: Image.Image, data: bytes, shrinks: bool) -> None:
    """Check the number of pixels and estimate the memory and time for decoding an opened image.

    Raises:
        Rejected: one of them exceeds its limit.
    """
    width, height = opened.size
    if opened.format in ("WEBP", "JXL", "JPEG2000"):
        return  # `check_before_opening` has checked these formats
    per_pixel = _STORED_BYTES.get(opened.mode, 4) + (1 if opened.mode in ("1", "L") or opened.mode[0] == "I" else 3)
    buffers = 0
    if isinstance(opened, JpegImageFile):
        try:
            multiscan = parse_header(data).multiscan
        except NotAJpeg:  # Pillow may parse a damaged header differently: count scans in the whole file
            multiscan = True
            scans = data.count(b"\xff\xda")
            if scans * width * height > MAX_SCAN_PIXELS:
                raise Rejected(
                    f"damaged JPEG: incomplete header and too many scans (up to {scans} of {width}x{height} pixels)"
                ) from None
        if multiscan:
            per_pixel += 2 * opened.layers  # decoders hold all coefficients in memory
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
            f"too large: decoding a {kind} of {width}x{height} pixels needs about {memory >> 20} MiB of memory; at "
            f"most {MAX_DECODE_MEMORY >> 20} are allowed"
        )


def _check_canvas(data: bytes, shrinks: bool) -> None:
    """Check formats whose decoders allocate memory on opening, or whose headers state several sizes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":  # Pillow allocates two canvases on opening
        _check_memory("WebP", webp_size(data), _WEBP_BYTES, len(data), shrinks=shrinks)
    elif (canvas := jxl_size(data)) is not None:  # Pillow decodes the image on opening
        _check_memory("JPEG XL", canvas, _DECODER_BYTES["JXL"], len(data), shrinks=shrinks)
    elif data.startswith((J2K_CODESTREAM, JP2_CONTAINER)):
        _check_jpeg2000(data, shrinks)
    elif data[4:8] == b"ftyp":
        if len(boxes(data)) > MAX_BOXES:
            raise Rejected(f"HEIF or AVIF with more than {MAX_BOXES:,} boxes")
        if (stated := isobmff_size(data)) != (0, 0):
            _check_memory("HEIF or AVIF", stated, _DECODER_BYTES["HEIF"], len(data), shrinks=shrinks)


def _check_jpeg2000(data: bytes, shrinks: bool) -> None:
    found = jpeg2000_size(data)
    if found is None:
        raise Rejected("does not decode: JPEG 2000 without a codestream")
    size, components = found
    # Measured bytes per pixel: 32-bit integers, the pixels of the codestream, and Pillow's pixels.
    _check_memory("JPEG 2000", size, 7 * components + 6, len(data), shrinks=shrinks)
    if len(boxes(data)) > MAX_BOXES:
        raise Rejected(f"JPEG 2000 with more than {MAX_BOXES:,} boxes")
    at = data.find(J2K_CODESTREAM) + 2
    for _ in range(MAX_BOXES):  # marker segments of the main header, before the first tile
        if at + 4 > len(data) or data[at + 1] in (0x90, 0xD9):
            return
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    raise Rejected(f"JPEG 2000 with more than {MAX_BOXES:,} segments before the first tile")


def _check_pnm(data: bytes) -> None:
    header = _PNM_HEADER.match(data[:MAX_PNM_HEADER])
    if header is None:
        if data[:2] in (b"P0", b"Pf", b"Py"):  # Pillow's own formats and PFM, whose headers have no comments
            return
        raise Rejected(f"does not decode: PNM without a header in its first {MAX_PNM_HEADER >> 10} KiB")
    kind, width, height, largest = (int(number or 0) for number in header.groups())
    if kind <= 3:
        _check_samples("text PNM", len(data) // 4)  # a sample is written as up to three digits and a space
    elif kind > 4 and largest != 255 and (kind, largest) != (5, 65535):
        _check_samples("PNM", width * height * (3 if kind == 6 else 1))


def _check_samples(kind: str, samples: int) -> None:
    if samples > MAX_PYTHON_SAMPLES:
        raise Rejected(
            f"too large: {kind} with {samples:,} samples; Pillow decodes this format in Python, and at most "
            f"{MAX_PYTHON_SAMPLES:,} samples are allowed; convert it to PNG first"
        )


def _check_strips(opened: TiffImagePlugin.TiffImageFile, data: bytes) -> int:
    """Return the size in bytes of the buffers that libtiff needs for one strip or tile.

    Raises:
        Rejected: JPEG-compressed strips have more scans than can be decoded in reasonable time; or the file is a camera
            raw file, whose first image is a preview.
    """
    tags = opened.tag_v2
    if _DNG_VERSION in tags or (_SUB_IMAGES in tags and int(tags.get(_SUBFILE_TYPE, 0)) & 1):
        raise Rejected("camera raw file, of which only a small preview could be read; convert it to TIFF or JPEG")
    width, height = opened.size
    rows = min(int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height)), height)
    strip = int(tags.get(_TILE_WIDTH, width)) * int(tags.get(_TILE_LENGTH, rows))
    if tags.get(TiffImagePlugin.COMPRESSION) in _TIFF_JPEG:
        tiled = _TILE_OFFSETS in tags
        offsets = tags.get(_TILE_OFFSETS if tiled else TiffImagePlugin.STRIPOFFSETS, ())
        counts = tags.get(_TILE_COUNTS if tiled else TiffImagePlugin.STRIPBYTECOUNTS, ())
        if sum(counts) > len(data):
            raise Rejected("damaged TIFF: its strips are larger than the file")
        scans = sum(data.count(b"\xff\xda", at, at + n) for at, n in zip(offsets, counts, strict=False))
        if scans * strip > MAX_SCAN_PIXELS:
            raise Rejected(f"TIFF with {scans} JPEG scans of {strip} pixels, which take too long to decode")
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    return strip * max(4, sum(bits) // 8)  # 4 bytes for YCbCr, which libtiff returns as RGBA
