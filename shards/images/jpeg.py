"""Parse JPEG headers: the marker segments of ITU-T T.81 (B.2) and the EXIF orientation."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from shards.images.limits import MAX_METADATA, MAX_SCANS, MAX_SEGMENTS

START = b"\xff\xd8\xff"
EXIF_SEGMENT = 0xE1  # marker APP1
BASELINE, PROGRESSIVE = 0, 2  # the n of start-of-frame markers SOFn

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15 without DHT, JPG, DAC
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and RST0..RST7, which have no length field
_SEQUENTIAL = frozenset({0, 1, 9})  # the n of SOFn in sequential, non-hierarchical JPEGs
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_NEXT_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # excludes byte stuffing, fill bytes, TEM, and RST0..RST7


class NotAJpeg(ValueError):
    """The data is not a JPEG, or ends before its frame header."""


class HeaderTooLong(NotAJpeg):
    """The JPEG has more segments or bytes before its first scan than `shards.images.limits` allows."""


@dataclass(frozen=True)
class JpegHeader:
    """Fields of the frame header, and the orientation."""

    height: int
    width: int
    components: int
    precision: int
    process: int
    """n of the start-of-frame marker SOFn: 0 is baseline, 2 is progressive, others are rare."""
    orientation: int
    """EXIF orientation 1..8; 1 when absent or out of range."""
    scans_at: int
    """Offset of the first scan."""
    multiscan: bool
    """Whether the image may have several scans: it is progressive, or its components have separate scans. Decoders then
    hold all coefficients of the image in memory and process it once per scan."""

    @property
    def is_standard(self) -> bool:
        """Whether all decoders support the image: baseline or progressive, 8 bits, grayscale or three components."""
        return self.process in (BASELINE, PROGRESSIVE) and self.precision == 8 and self.components in (1, 3)


def parse_header(data: bytes) -> JpegHeader:
    """Read the segments before the first scan.

    Raises:
        NotAJpeg: there is no frame header before the first scan.
        HeaderTooLong: there are more than `MAX_METADATA` bytes or `MAX_SEGMENTS` segments before the first scan.
    """
    if data[:3] != START:
        raise NotAJpeg("the start-of-image marker is missing")
    orientation = 1
    frame: tuple[int, ...] | None = None
    at = 2
    try:
        for _ in range(MAX_SEGMENTS):
            if at > MAX_METADATA:
                raise HeaderTooLong(f"more than {MAX_METADATA >> 20} MiB before its first scan")
            if data[at] != 0xFF:
                raise NotAJpeg("a segment of the header has no marker")
            marker = data[at + 1]
            if marker == 0xFF:  # a fill byte
                at += 1
                continue
            if marker in _STANDALONE:
                at += 2
                continue
            if marker in (_START_OF_SCAN, _END_OF_IMAGE):
                scan_components = data[at + 4] if marker == _START_OF_SCAN else 0
                break
            (length,) = struct.unpack_from(">H", data, at + 2)
            if marker in _FRAMES and frame is None:
                frame = (marker - 0xC0, *struct.unpack_from(">BHHB", data, at + 4))
            elif marker == EXIF_SEGMENT and data[at + 4 : at + 10] == b"Exif\0\0" and orientation == 1:
                orientation = _orientation(data[at + 10 : at + 2 + length])
            at += 2 + length
        else:
            raise HeaderTooLong(f"more than {MAX_SEGMENTS:,} segments before its first scan")
    except (IndexError, struct.error):
        raise NotAJpeg("the file ends within the header") from None
    if frame is None:
        raise NotAJpeg("no frame header")
    process, precision, height, width, components = frame
    multiscan = process not in _SEQUENTIAL or scan_components < components
    return JpegHeader(height, width, components, precision, process, orientation, at, multiscan)


def count_scans(data: bytes, header: JpegHeader, most: int) -> int:
    """Count the scans of the image; data after the image is ignored.

    Returns:
        The number of scans, or an upper bound that is at most `MAX_SCANS`; any number above `most` if there are more
        than `most` scans.
    """
    if not header.multiscan:
        return 1
    # Every scan begins with these two bytes. Metadata and data after the image may contain them too, so the count is an
    # upper bound. Walking from segment to segment is slower, and only needed if the bound exceeds the limit.
    bound = data.count(b"\xff\xda", header.scans_at)
    return bound if bound <= min(MAX_SCANS, most) else _walk_scans(data, header.scans_at, most)


def has_profile(data: bytes, header: JpegHeader) -> bool:
    """Return whether the header seems to contain an ICC profile (ICC.1, annex B.4)."""
    return data.find(b"ICC_PROFILE\0", 0, header.scans_at) >= 0


def _walk_scans(data: bytes, at: int, most: int) -> int:
    scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = data[at + 1]
        if marker == _END_OF_IMAGE:
            return scans
        scans += marker == _START_OF_SCAN
        if scans > most or at + 4 > len(data):
            return scans
        following = _NEXT_MARKER.search(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        if following is None:
            return scans
        at = following.start()
    return most + 1  # the JPEG has too many segments between its scans


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """Insert a segment into a JPEG, after its JFIF segment if it has one (JFIF has to be first)."""
    at = 2
    if data[2:4] == b"\xff\xe0":
        at += 2 + int.from_bytes(data[4:6], "big")
    return data[:at] + bytes((0xFF, marker)) + (2 + len(content)).to_bytes(2, "big") + content + data[at:]


def _orientation(tiff: bytes) -> int:
    """Read the orientation from the first directory of an EXIF block (TIFF 6.0, section 2); 1 if it has none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION_TAG and kind == _SHORT and 1 <= value <= 8:
                return value
    except struct.error:
        pass
    return 1
