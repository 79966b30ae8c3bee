"""Which files are images, by name and by content, and which of Pillow's formats are ever opened."""

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
"""Raw files of cameras. By content they are TIFF files of a thumbnail."""
APPLE_DOUBLE = b"._"
"""Prefix of the resource forks that macOS leaves beside files, under the files' own suffixes."""
MAGIC_BYTES = 16
"""Bytes at the start of a file that `looks_like_image` needs."""

PILLOW_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI", "SGI", "PCX"),
    "TGA",  # the last one: it has no signature
)
"""The formats that are opened, in the order in which they are tried. Never those whose plugins run other programs or
hand over to them (EPS, WMF, MPEG, HDF5, GRIB, BUFR), nor icons, layered documents, textures and scientific tables."""
EXTRA = "formats"
"""The extra of pyproject.toml that installs the decoders of HEIF and JPEG XL."""

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
_BINARY_PNM = re.compile(rb"P[456]\s+(#|\d)")  # the plain ones (P1 to P3) may be any text


def named_as_image(name: bytes) -> bool:
    """Return whether a file's name says that it is an image."""
    return not name.startswith(APPLE_DOUBLE) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these `MAGIC_BYTES` is of one of the formats that can be used."""
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[4:8] == b"ftyp" and start[8:12] in _AVIF_BRANDS | _HEIF_BRANDS)
        or _BINARY_PNM.match(start) is not None
    )


def is_jxl(data: bytes) -> bool:
    """Return whether this is a JPEG XL file (ISO/IEC 18181-2)."""
    return data.startswith((JXL_CODESTREAM, JXL_CONTAINER))


def is_heif(data: bytes) -> bool:
    """Return whether this is a HEIF file (ISO/IEC 23008-12) other than AVIF, which shares its container."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MAX_BRANDS)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS
