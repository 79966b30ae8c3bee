"""Decompression bombs: small image files that cost a decoder minutes or gigabytes. `IMAGES` has one of each kind."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image


def progressive_jpeg(width: int, height: int, scans: int, between: bytes = b"") -> bytes:
    """Return a grayscale progressive JPEG: a scan of DC coefficients and `scans` scans of end-of-band runs only.

    Args:
        between: bytes after the first scan, for example segments.
    """
    blocks = -(-width // 8) * -(-height // 8)
    start = b"\xff\xd8\xff\xdb\x00\x43\x00" + bytes([1] * 64)
    start += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    start += b"\xff\xc4" + struct.pack(">HB", 20, 0x00) + bytes([1] + [0] * 15) + b"\x00"  # one DC symbol: 0
    start += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + b"\xe0"  # one AC symbol: a long run
    first = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" + bytes(-(-blocks // 8))
    bits = ""
    left = blocks
    while left > 0:  # a run covers 2^14 blocks plus the value of its 14 bits
        more = max(0, min(left, 2**15 - 1) - 2**14)
        bits += f"0{more:014b}"
        left -= 2**14 + more
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return start + first + between + (b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + coded) * scans + b"\xff\xd9"


def comment(content: bytes) -> bytes:
    """Return a JPEG comment segment."""
    return b"\xff\xfe" + struct.pack(">H", 2 + len(content)) + content


def png(
    width: int, height: int, color_type: int = 2, depth: int = 8, *, chunks: int = 0, rows: int | None = None
) -> bytes:
    """Return a black PNG, compressed 1000:1, with `chunks` empty chunks; its pixels end after `rows` rows."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    row = bytes(1 + width * channels * depth // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", head), chunk(b"teSt", b"") * chunks, chunk(b"IDAT", packed), chunk(b"IEND", b""))
    )


def png_with_text(size: int) -> bytes:
    """Return a PNG whose compressed text has `size` bytes when decompressed."""
    content = b"key\0\0" + zlib.compress(bytes(size), 9)
    text = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    plain = png(8, 8)
    return plain[:33] + text + plain[33:]


def tiff(tags: dict[int, tuple[int, int, int]], after: bytes = b"") -> bytes:
    """Return a little-endian TIFF with one directory (tag -> type, count, value or offset) and the bytes `after` it."""
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + after


SHORT, LONG = 3, 4
_GRAY = {256: (LONG, 1, 64), 257: (LONG, 1, 64), 258: (SHORT, 1, 8), 262: (SHORT, 1, 1), 277: (SHORT, 1, 1)}


def tiff_of_strips(strips: int) -> bytes:
    """Return a grayscale TIFF of 64x64 pixels with `strips` strips."""
    tags = _GRAY | {259: (SHORT, 1, 1), 278: (LONG, 1, 1)}
    end = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {273: (LONG, strips, end), 279: (LONG, strips, end)}
    return tiff(tags, bytes(4 * strips))


def tiff_of_a_large_tile(side: int) -> bytes:
    """Return an LZW-compressed grayscale TIFF of 64x64 pixels in one tile of `side` x `side`."""
    tags = _GRAY | {259: (SHORT, 1, 5), 322: (LONG, 1, side), 323: (LONG, 1, side), 325: (LONG, 1, 64)}
    tags[324] = (LONG, 1, 8 + 2 + 12 * (len(tags) + 1) + 4)
    return tiff(tags, bytes(64))


def run_length_bmp(size: int) -> bytes:
    """Return a BMP with `size` bytes of single-pixel runs, which Pillow decodes in Python."""
    head = struct.pack("<IiiHHIIiiII", 40, 10_000, 10_000, 1, 8, 1, size, 0, 0, 256, 0)
    at = 14 + 40 + 4 * 256
    return b"BM" + struct.pack("<IHHI", at + size, 0, 0, at) + head + bytes(4 * 256) + b"\1\0" * (size // 2)


def webp(width: int, height: int) -> bytes:
    """Return a WebP whose header states this canvas size."""
    out = io.BytesIO()
    Image.new("RGBA", (16, 16), (1, 2, 3, 4)).save(out, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    data = bytearray(out.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@dataclass(frozen=True)
class Bomb:
    """An image that must be rejected."""

    make: Callable[[], bytes]
    reason: str
    """Regular expression that the reason must match."""


def pnm(kind: bytes, width: int, height: int, *, comment: int = 0, largest: int = 255, size: int = 0) -> bytes:
    """Return a PNM with a comment of `comment` bytes in its header and `size` zero bytes of pixels."""
    return (
        kind
        + b"\n"
        + (b"#" * comment + b"\n" if comment else b"")
        + b"%d %d %d\n" % (width, height, largest)
        + bytes(size)
    )


def saved(kind: str, **options: object) -> bytearray:
    """Return an encoded image of 64x48 pixels."""
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (1, 2, 3)).save(out, kind, **options)
    return bytearray(out.getvalue())


def with_sides(data: bytearray, at: int, *sides: int, size: int = 4, order: Literal["big", "little"] = "big") -> bytes:
    """Write other side lengths into the header of an encoded image."""
    for i, side in enumerate(sides):
        data[at + size * i : at + size * (i + 1)] = side.to_bytes(size, order)
    return bytes(data)


def jpeg2000(width: int, height: int, *, segments: int = 0, boxes: int = 0, components: int = 3) -> bytes:
    """Return a JP2 whose container states 64x48 pixels and whose codestream states another size."""
    data = saved("JPEG2000")
    start = data.index(b"\xff\x4f\xff\x51")
    with_sides(data, start + 8, width, height)
    with_sides(data, start + 40, components, size=2)
    if segments:
        end = start + 4 + int.from_bytes(data[start + 4 : start + 6], "big")
        data[end:end] = b"\xff\x5c\0\x02" * segments
    at = 12  # after the signature box
    data[at:at] = b"\0\0\0\x08free" * boxes
    return bytes(data)


def isobmff(kind: str, width: int, height: int) -> bytes:
    """Return an AVIF or HEIF whose image spatial extents property states this size."""
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    data = saved(kind)
    at = data.index(b"ispe")
    return with_sides(data, at + 8, width, height)


def jxl(width: int, height: int, *, container: bool = False) -> bytes:
    """Return only the signature and size header of a JPEG XL (ISO/IEC 18181-1)."""
    bits, filled = 0, 1  # first bit: the "small" flag is unset
    for side in (height, width):
        bits |= (3 | (side - 1) << 2) << filled
        filled += 32
        if side is height:
            filled += 3  # ratio code 0: the width follows
    stream = b"\xff\x0a" + bits.to_bytes(32, "little")
    if not container:
        return stream
    return b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I", 8 + len(stream)) + b"jxlc" + stream


_STRAY = b"\0\0\0"  # between two segments, so that the header cannot be parsed

IMAGES = {
    "jpeg of 1000 scans": Bomb(lambda: progressive_jpeg(9990, 9990, 1000), "more than 20 scans of 9990x9990"),
    "scans behind a comment that holds an end of image": Bomb(
        lambda: progressive_jpeg(9990, 9990, 100, comment(b"\xff\xd9")), "more than 20 scans"
    ),
    "scans behind a damaged header": Bomb(
        lambda: progressive_jpeg(9990, 9990, 100).replace(b"\xff\xc2", _STRAY + b"\xff\xc2", 1),
        r"too many scans \(up to 101 of 9990x9990"
    ),
    "four million comments": Bomb(
        lambda: progressive_jpeg(16, 16, 1).replace(b"\xff\xdb", comment(b"") * 4_000_000 + b"\xff\xdb", 1), "segments"
    ),
    "fill bytes": Bomb(
        lambda: progressive_jpeg(16, 16, 1).replace(b"\xff\xdb", b"\xff" * 18_000_000 + b"\xdb", 1), "segments"
    ),
    "segments between scans": Bomb(
        lambda: progressive_jpeg(9990, 9990, 1, comment(b"") * 100_000 + comment(b"\xff\xda" * 100)), "scans"
    ),
    "metadata of 20 MB": Bomb(
        lambda: progressive_jpeg(16, 16, 1).replace(b"\xff\xdb", comment(bytes(65_000)) * 300 + b"\xff\xdb", 1), "MiB"
    ),
    "stray bytes of 20 MB": Bomb(
        lambda: progressive_jpeg(16, 16, 1).replace(b"\xff\xdb", bytes(20_000_000) + b"\xff\xdb", 1), "MiB"
    ),
    "png of a gigapixel": Bomb(lambda: png(40_000, 25_000, 0, rows=1), "too large"),
    "png of a million chunks": Bomb(lambda: png(8, 8, chunks=1_000_000), "chunks"),
    "compressed text": Bomb(lambda: png_with_text(100_000_000), "does not decode"),
    "tiff of four million strips": Bomb(lambda: tiff_of_strips(4_000_000), "4000000 strips"),
    "tiff of a large tile": Bomb(lambda: tiff_of_a_large_tile(40_000), "needs about"),
    "run-length bmp": Bomb(lambda: run_length_bmp(20_000_000), "run-length"),
    "webp of 16383x16383": Bomb(lambda: webp(16383, 16383), "too large: 16383x16383"),
    "pnm of 50000x50000": Bomb(lambda: pnm(b"P6", 50_000, 50_000), "too large: (50000x50000|2500000000)"),
    "pnm of a long comment": Bomb(lambda: pnm(b"P5", 8, 8, comment=20_000_000, size=64), "without a header"),
    "text pnm of 100 MB": Bomb(lambda: pnm(b"P3", 9_000, 3_000, size=100_000_000), "decodes this format in Python"),
    "pnm of 12 bits and 30 megapixels": Bomb(
        lambda: pnm(b"P5", 6_000, 5_000, largest=4095, size=60_000_000), "decodes this format in Python"
    ),
    "tga of 50000x50000": Bomb(
        lambda: with_sides(saved("TGA", compression="tga_rle"), 12, 50_000, 50_000, size=2, order="little"),
        "2500000000",
    ),
    "pcx of 50000x50000": Bomb(
        lambda: with_sides(saved("PCX"), 8, 49_999, 49_999, size=2, order="little"),
        "too large: (50000x50000|2500000000)",
    ),
    "sgi of 50000x50000": Bomb(lambda: with_sides(saved("SGI"), 6, 50_000, 50_000, size=2), "2500000000"),
    "qoi of 50000x50000": Bomb(
        lambda: with_sides(saved("QOI"), 4, 50_000, 50_000), "too large: (50000x50000|2500000000)"
    ),
    "qoi of 90 megapixels": Bomb(
        lambda: with_sides(saved("QOI"), 4, 10_000, 9_000), "needs about|decodes this format in Python"
    ),
    "jpeg 2000 of 50000x50000": Bomb(lambda: jpeg2000(50_000, 50_000), "too large: (50000x50000|2500000000)"),
    "jpeg 2000 of 49 megapixels": Bomb(lambda: jpeg2000(7_000, 7_000), "needs about"),
    "jpeg 2000 of 16384 components": Bomb(lambda: jpeg2000(640, 480, components=16_384), "needs about"),
    "jpeg 2000 of a million segments": Bomb(lambda: jpeg2000(64, 48, segments=1_000_000), "segments"),
    "jpeg 2000 of a million boxes": Bomb(lambda: jpeg2000(64, 48, boxes=1_000_000), "boxes"),
    "avif of 16000x15000": Bomb(lambda: isobmff("AVIF", 16_000, 15_000), "too large"),
    "avif of 60 megapixels": Bomb(lambda: isobmff("AVIF", 10_000, 6_000), "needs about"),
    "heif of 50000x50000": Bomb(lambda: isobmff("HEIF", 50_000, 50_000), "too large: 50000x50000"),
    "heif of 60 megapixels": Bomb(lambda: isobmff("HEIF", 10_000, 6_000), "needs about"),
    "jpeg xl of 50000x50000": Bomb(lambda: jxl(50_000, 50_000), "too large: (50000x50000|2500000000)"),
    "jpeg xl of 60 megapixels": Bomb(lambda: jxl(10_000, 6_000, container=True), "needs about"),
    "webp of 60 megapixels": Bomb(lambda: webp(10_000, 6_000), "needs about"),
}
