"""Write deterministic tars (POSIX.1-1988 ustar), and the .idx files for DALI's own WebDataset reader."""

from __future__ import annotations

from io import FileIO
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.files.durable import write_parts

BLOCK = 512
END = bytes(2 * BLOCK)

# https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html, "ustar Interchange Format"
_NAME = 100
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, uid, gid
_MTIME = b"00000000000\0"
_AFTER_SUM = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" + b"0000000\0" + bytes(155 + 12)
_SUM_OF_FIXED = sum(_BEFORE_SIZE) + sum(_MTIME) + sum(_AFTER_SUM) + 8 * ord(" ")

Size = TypeVar("Size", np.int64, NDArray[np.int64])


def header(name: str, size: int) -> bytes:
    """Return the header block of a regular file: mode 0644, owner 0, time 0, so that equal content gives equal tars."""
    encoded = name.encode("latin-1")
    assert len(encoded) <= _NAME, name
    digits = b"%011o\0" % size
    checksum = _SUM_OF_FIXED + sum(encoded) + sum(digits)
    return encoded.ljust(_NAME, b"\0") + _BEFORE_SIZE + digits + _MTIME + b"%06o\0 " % checksum + _AFTER_SUM


def padding(size: int) -> bytes:
    """Return the zero bytes after a member of `size` bytes."""
    return bytes(-size % BLOCK)


def member_bytes(size: Size) -> Size:
    """Return the bytes that a member of `size` bytes needs in a tar: header, content and padding."""
    return BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK


class SampleTar:
    """Writes samples (KEY.jpg or KEY.ppm, and KEY.cls) to an open file and computes its hash.

    Attributes:
        bytes: number of bytes written so far.
        index_lines: lines of the DALI index, one per sample.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.bytes = 0
        self.index_lines: list[str] = []

    def add(self, key: str, image: bytes, label: int, ppm: bytes = b"") -> int:
        """Append a sample; return the offset of the first byte of `image`.

        Args:
            image: a JPEG, or pixels.
            ppm: header of a PPM, which makes a PPM of pixels. Empty: `image` is a JPEG.
        """
        text = b"%d" % label
        suffix, size = image_suffix(pixels=bool(ppm)), len(ppm) + len(image)
        member_at = self.bytes + BLOCK
        label_part = padding(size) + header(f"{key}.cls", len(text)) + text + padding(len(text))
        self._write([header(f"{key}.{suffix}", size), ppm, image, label_part])
        self.index_lines.append(index_line(key, suffix, member_at, size, len(text)))
        return member_at + len(ppm)

    def finish(self) -> str:
        """Write the end-of-archive blocks; return the xxh3-64 of the whole file as 16 hex digits."""
        self._write([END])
        return self._hash.hexdigest()

    def _write(self, parts: list[bytes]) -> None:
        write_parts(self._file, parts)
        for part in parts:
            self._hash.update(part)
            self.bytes += len(part)


def image_suffix(*, pixels: bool) -> str:
    """Return the suffix of the images in a tar."""
    return "ppm" if pixels else "jpg"


def key_of(name: str) -> str:
    """Return the key of a sample from the name of its image in a tar."""
    return name.removesuffix(".jpg").removesuffix(".ppm")


def index_line(key: str, suffix: str, image_at: int, image_size: int, label_size: int) -> str:
    """Return a sample's line of the DALI index, for an image file of `image_size` bytes at `image_at`."""
    label_at = image_at - BLOCK + int(member_bytes(np.int64(image_size))) + BLOCK
    return f"{suffix} {image_at} {image_size} {key}.{suffix} cls {label_at} {label_size} {key}.cls"


def dali_index(lines: list[str]) -> bytes:
    """Return the content of an .idx file (v1.2): a line per sample with extension, offset, size and name."""
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode("ascii")
