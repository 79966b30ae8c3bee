"""Read image sizes from headers, for formats whose decoders allocate memory before Pillow knows the size."""

from __future__ import annotations

from shards.images.formats import J2K_CODESTREAM, JXL_CODESTREAM, is_jxl
from shards.images.limits import MAX_BOXES

MAX_META = 2**20
"""Number of leading bytes of an AVIF or HEIF that are searched for its properties."""
Size = tuple[int, int]
"""(width, height) in pixels."""

_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height of ratio codes 1 to 7
_JXL_SIDE_BITS = (9, 13, 18, 30)


def webp_size(data: bytes) -> Size:
    """Return the canvas size of a WebP (RFC 9649, sections 2.5 to 2.7)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def jpeg2000_size(data: bytes) -> tuple[Size, int] | None:
    """Return the size and number of components of a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1).

    The container may state other values, but decoders use those of the codestream.

    Returns:
        None if there is no codestream.
    """
    at = data.find(J2K_CODESTREAM)
    if at < 0 or at + 42 > len(data):
        return None
    x1, y1, x0, y0 = (int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(4))
    return (max(x1 - x0, 0), max(y1 - y0, 0)), int.from_bytes(data[at + 40 : at + 42], "big")


def isobmff_size(data: bytes) -> Size:
    """Return the largest size that an AVIF or HEIF states (ISO/IEC 23008-12, 6.5.3), before or after cropping."""
    found = [(0, 0)]
    at = -1
    for _ in range(MAX_BOXES):
        at = data.find(b"ispe", at + 1, MAX_META)
        if at < 0:
            break
        found.append((int.from_bytes(data[at + 8 : at + 12], "big"), int.from_bytes(data[at + 12 : at + 16], "big")))
    return max(found, key=lambda size: size[0] * size[1])


def jxl_size(data: bytes) -> Size | None:
    """Return the canvas size of a JPEG XL (ISO/IEC 18181-1, SizeHeader); None if no size header is found."""
    if not is_jxl(data):
        return None
    codestream = data[:32] if data.startswith(JXL_CODESTREAM) else _jxl_codestream(data)
    if not codestream.startswith(JXL_CODESTREAM):
        return None
    bits = int.from_bytes(codestream[2:32], "little")

    def read_bits(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = read_bits(1)

    def side() -> int:
        return 8 * (1 + read_bits(5)) if small else 1 + read_bits(_JXL_SIDE_BITS[read_bits(2)])

    height = side()
    ratio = read_bits(3)
    if ratio == 0:
        return side(), height
    wide, high = _JXL_RATIOS[ratio - 1]
    return height * wide // high, height


def _jxl_codestream(data: bytes) -> bytes:
    """Return the first bytes of the codestream in a container (ISO/IEC 18181-2)."""
    for kind, start, stop in boxes(data):
        if kind in (b"jxlc", b"jxlp"):
            skipped = 4 if kind == b"jxlp" else 0  # a jxlp box begins with a sequence number of 4 bytes
            return data[start + skipped : min(stop, start + skipped + 32)]
    return b""


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """Return (type, start, end) of each box's content (ISO/IEC 14496-12, 4.2), of at most `MAX_BOXES` + 1 boxes."""
    found: list[tuple[bytes, int, int]] = []
    at = 0
    while at + 8 <= len(data) and len(found) <= MAX_BOXES:
        size, start = int.from_bytes(data[at : at + 4], "big"), at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = len(data) if size == 0 else at + size
        if stop < start:
            break
        found.append((data[at + 4 : at + 8], start, stop))
        at = stop
    return found
