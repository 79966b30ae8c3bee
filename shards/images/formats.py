"""Recognize image files by name and by content; list the Pillow formats that may be opened."""

from __future__ import annotations

import os
import re

IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .pcx .sgi "
    b".rgb .rgba .bw .qoi .jp2 .j2k .j2c .jpc .jpf .jpx .avif .avifs .heic .heics .heif .heifs .hif .jxl".split()
)
RAW_SUFFIXES = frozenset(
    b".3fr .arw .cr2 .cr3 .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .srw .x3f".split()
)
"""Camera raw files. Their content begins like a TIFF that holds only a thumbnail."""
APPLE_DOUBLE = b"._"
"""Prefix of AppleDouble files: macOS stores the resource fork of x.jpg in a file ._x.jpg."""
MAGIC_BYTES = 16
"""Number of leading bytes that `looks_like_image` needs."""

PILLOW_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI", "SGI", "PCX"),
    "TGA",  # must be tried last, because TGA files have no signature
)
"""Pillow formats that may be opened, in the order in which they are tried. Formats whose plugins call other programs
(EPS, WMF, MPEG, HDF5, GRIB, BUFR), icons, layered documents, textures, and scientific tables are excluded."""
EXTRA = "formats"
"""Name of the extra in pyproject.toml that installs the decoders of HEIF and JPEG XL."""

JXL_CODESTREAM = b"\xff\x0a"
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
JP2_CONTAINER = b"\0\0\0\x0cjP  \r\n\x87\n"
J2K_CODESTREAM = b"\xff\x4f\xff\x51"
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"qoif"),
    *(JXL_CODESTREAM, JXL_CONTAINER, JP2_CONTAINER, J2K_CODESTREAM),
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
_MAX_BRANDS = 64
_BINARY_PNM = re.compile(rb"P[456]\s+(#|\d)")  # excludes the text formats P1 to P3, because any text may look like them


def named_as_image(name: bytes) -> bool:
    """Return whether a file has the suffix of an image."""
    return not name.startswith(APPLE_DOUBLE) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these `MAGIC_BYTES` has one of the supported image formats."""
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[4:8] == b"ftyp" and start[8:12] in _AVIF_BRANDS | _HEIF_BRANDS)
        or _BINARY_PNM.match(start) is not None
    )


def is_jxl(data: bytes) -> bool:
    """Return whether the data is a JPEG XL file (ISO/IEC 18181-2)."""
    return data.startswith((JXL_CODESTREAM, JXL_CONTAINER))


def is_heif(data: bytes) -> bool:
    """Return whether the data is a HEIF file (ISO/IEC 23008-12); AVIF, which has the same container, is excluded."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MAX_BRANDS)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS
