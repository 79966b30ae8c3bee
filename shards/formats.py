"""Which files are images, by name and by content."""

from __future__ import annotations

import os

IMAGE_SUFFIXES = frozenset(
    {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff"}
)
APPLE_DOUBLE = b"._"
"""Prefix of the resource forks that macOS leaves beside files, under the files' own suffixes."""
MAGIC_BYTES = 16
"""Bytes at the start of a file that `looks_like_image` needs."""


def named_as_image(name: bytes) -> bool:
    """Return whether a file's name says that it is an image."""
    return not name.startswith(APPLE_DOUBLE) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these `MAGIC_BYTES` is of one of the formats that can be used."""
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )
