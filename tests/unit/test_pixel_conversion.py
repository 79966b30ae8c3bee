"""Images of more than 8 bits, of floating point, with transparency, or in CMYK are converted to the intended pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from shards.images.accept import accept
from shards.images.rules import Accepted, ImageRules, Rejected
from tests.support.decompression_bombs import LONG, SHORT, tiff

RULES = ImageRules()
HEIGHT, WIDTH = 16, 64
RAMP = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
SIGNED, FLOAT = 2, 3
UNSIGNED = 1


def png(samples: NDArray[Any], chunks: bytes = b"", color_type: int | None = None, depth: int | None = None) -> bytes:
    """Return a PNG of unsigned samples [H, W] or [H, W, C]. With a depth below 8, the caller packs the samples."""
    depth = depth or 8 * samples.dtype.itemsize
    kind = color_type if color_type is not None else 0 if samples.ndim == 2 else {2: 4, 3: 2, 4: 6}[samples.shape[2]]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in samples)
    width = samples.shape[1] * 8 // depth if depth < 8 else samples.shape[1]
    head = struct.pack(">IIBBBBB", width, len(samples), depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def sbit(*bits: int) -> bytes:
    return chunk(b"sBIT", bytes(bits))


def tiff_of(samples: NDArray[Any], sample_format: int = UNSIGNED, **more: tuple[int, float | int] | int) -> bytes:
    """Return a little-endian TIFF with one strip; `more`: photometric, and tags by name as (type, value)."""
    bits = 8 * samples.dtype.itemsize
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    names = {"smin": 340, "smax": 341, "max_sample": 281}
    tags = {
        256: (LONG, 1, samples.shape[1]),
        257: (LONG, 1, len(samples)),
        258: (SHORT, 1, bits),
        259: (SHORT, 1, 1),
        262: (SHORT, 1, int(more.pop("photometric", 1 if channels == 1 else 2))),  # type: ignore[arg-type]
        277: (SHORT, 1, channels),
        278: (LONG, 1, len(samples)),
        279: (LONG, 1, samples.nbytes),
        339: (SHORT, 1, sample_format),
    }
    for name, entry in more.items():
        kind, value = entry  # type: ignore[misc]
        packed = struct.unpack("<I", struct.pack({3: "<Hxx", 4: "<I", 9: "<i", 11: "<f"}[kind], value))[0]
        tags[names[name]] = (kind, 1, packed)
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    if channels == 3:
        tags[258] = (SHORT, 3, start)
        tags[273] = (LONG, 1, start + 6)
        return tiff(tags, struct.pack("<HHH", bits, bits, bits) + samples.tobytes())
    tags[273] = (LONG, 1, start)
    return tiff(tags, samples.astype(samples.dtype.newbyteorder("<")).tobytes())


def packed12(samples: NDArray[np.uint16]) -> bytes:
    """Return a 12-bit TIFF, with two samples in three bytes."""
    one, two = samples[:, ::2].astype(np.uint32), samples[:, 1::2].astype(np.uint32)
    rows = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], axis=-1).astype(np.uint8)
    plain = tiff_of(rows.reshape(len(samples), -1))
    return plain.replace(struct.pack("<HHII", 258, SHORT, 1, 8), struct.pack("<HHII", 258, SHORT, 1, 12)).replace(
        struct.pack("<HHII", 256, LONG, 1, rows.shape[1] * 3), struct.pack("<HHII", 256, LONG, 1, samples.shape[1])
    )


def shown(data: bytes) -> tuple[NDArray[np.int32], Accepted]:
    image = accept(data, RULES)
    return np.asarray(Image.open(io.BytesIO(image.data)), np.int32), image


def scaled(white: float, kind: Any = np.uint16) -> NDArray[Any]:
    return (RAMP / 255 * white).astype(kind)


DEEP = scaled(65535)
TWELVE = scaled(4095)
GRAYSCALE_RAMPS = {
    "png of 16 bits": png(DEEP),
    "png with sBIT 12, lower bits used": png(TWELVE, sbit(12)),
    "png with sBIT 12, upper bits used": png(TWELVE << 4, sbit(12)),
    "png with sBIT 12, upper bits repeated in the lower bits": png(TWELVE << 4 | TWELVE >> 8, sbit(12)),
    "png with sBIT 10": png(scaled(1023), sbit(10)),
    "png with sBIT 8": png(RAMP.astype(np.uint16), sbit(8)),
    "pgm of 12 bits": b"P5 64 16 4095\n" + TWELVE.astype(">u2").tobytes(),
    "pgm of 16 bits": b"P5 64 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "pfm": b"Pf 64 16 -1.0\n" + scaled(1, np.float32)[::-1].astype("<f4").tobytes(),
    "tiff of 16 bits": tiff_of(DEEP),
    "tiff of 12 bits": packed12(TWELVE),
    "tiff of 12 bits in 16, SMaxSampleValue": tiff_of(TWELVE, smax=(SHORT, 4095)),
    "tiff of 12 bits in 16, MaxSampleValue": tiff_of(TWELVE, max_sample=(SHORT, 4000)),
    "tiff of 16 bits, white is zero": tiff_of(65535 - DEEP, photometric=0),
    "tiff of 12 bits in 16, white is zero": tiff_of(4095 - TWELVE, photometric=0, smax=(SHORT, 4095)),
    "tiff of 8 bits, white is zero": tiff_of(255 - RAMP, photometric=0),
    "tiff of 8 bits in 32": tiff_of(RAMP.astype(np.uint32)),
    "tiff of 16 bits in 32": tiff_of(DEEP.astype(np.uint32)),
    "tiff of 32 bits": tiff_of(scaled(2**32 - 1, np.uint64).astype(np.uint32)),
    "tiff of floats from 0 to 1": tiff_of(scaled(1, np.float32), FLOAT),
    "tiff of floats, SMinSampleValue and SMaxSampleValue": tiff_of(
        scaled(100, np.float32) - 20, FLOAT, smin=(11, -20.0), smax=(11, 80.0)
    ),
    "tiff of floats, white is zero": tiff_of(1 - scaled(1, np.float32), FLOAT, photometric=0),
    "tiff of signed 16 bits, SMinSampleValue and SMaxSampleValue": tiff_of(
        scaled(2000, np.int16) - 1000, SIGNED, smin=(9, -1000), smax=(9, 1000)
    ),
    "tiff of signed 16 bits, all samples positive": tiff_of(scaled(32767, np.int16), SIGNED),
}


@pytest.mark.parametrize("name", GRAYSCALE_RAMPS)
def test_a_grayscale_ramp_is_preserved_by_every_storage_format(name: str) -> None:
    pixels, _ = shown(GRAYSCALE_RAMPS[name])
    assert pixels.shape == RAMP.shape
    assert np.abs(pixels - RAMP).max() <= 4, "tolerance for rounding and JPEG"


def test_a_dark_left_aligned_png_stays_dark() -> None:
    """Its largest sample fits in 12 bits, but as the lowest four bits are all zero, the samples are left-aligned."""
    dark = scaled(255)
    pixels, _ = shown(png(dark << 4, sbit(12)))
    assert np.abs(pixels - (dark >> 4)).max() <= 4


COLORS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], axis=-1)


@pytest.mark.parametrize(
    "data",
    [
        png((COLORS.astype(np.uint16) << 8) + 77),
        png(COLORS.astype(np.uint16) << 4 | 5, sbit(12, 12, 12)),
        png(COLORS.astype(np.uint16) << 8, sbit(12, 12, 12)),
        tiff_of((COLORS.astype(np.uint16) << 8) + 77),
        tiff_of(COLORS.astype(np.uint16) << 4 | 5, smax=(SHORT, 4095)),
    ],
)
def test_rgb_of_more_than_8_bits_is_converted(data: bytes) -> None:
    pixels, _ = shown(data)
    assert np.abs(pixels - COLORS).mean() < 2


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (png(DEEP), "PNG: upper 8 of 16 bits kept"),
        (png(TWELVE), "PNG: upper 8 of 16 bits kept, although all samples fit in 12 bits"),
        (tiff_of(TWELVE), "TIFF: upper 8 of 16 bits kept, although all samples fit in 12 bits"),
        (png(COLORS.astype(np.uint16) << 8), "PNG: upper 8 of 16 bits kept"),
        (
            tiff_of(RAMP.astype(np.uint32)),
            "TIFF: 32-bit samples converted as 8-bit samples, because all of them fit in 8 bits",
        ),
        (png(RAMP), "PNG"),
        (png(TWELVE, sbit(12)), "PNG"),
    ],
)
def test_the_repair_reason_states_the_assumed_bit_depth(data: bytes, note: str) -> None:
    assert shown(data)[1].repair == note


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff_of(scaled(255, np.float32), FLOAT), "floating-point samples from 0 to 255.*SMinSampleValue"),
        (tiff_of(scaled(1, np.float32) - 0.5, FLOAT), "floating-point samples from -0.5 to 0.5"),
        (tiff_of(np.full_like(scaled(1, np.float32), np.nan), FLOAT), "floating-point samples from nan"),
        (tiff_of(np.full_like(scaled(1, np.float32), np.inf), FLOAT), "floating-point samples from nan"),
        (tiff_of(scaled(2000, np.int16) - 1000, SIGNED), "signed samples from -1000 to 1000"),
    ],
)
def test_samples_without_a_known_range_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        accept(data, RULES)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gray_alpha() -> NDArray[np.uint8]:
    return np.stack([np.zeros_like(RAMP), RAMP], axis=-1)


ON_WHITE = 255 - RAMP
PALETTE = b"".join(bytes([i, i, i]) for i in range(256))
TRANSPARENT = {
    "gray with alpha": png(gray_alpha()),
    "gray with alpha of 16 bits": png(gray_alpha().astype(np.uint16) * 257),
    "color with alpha of 16 bits": png(np.dstack([np.zeros((*RAMP.shape, 3)), RAMP]).astype(np.uint16) * 257),
    "palette with alpha": png(RAMP, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(range(256))), color_type=3),
    "gray with a transparent level": png(RAMP, chunk(b"tRNS", b"\0\0")),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_composited_onto_white(name: str) -> None:
    pixels, _ = shown(TRANSPARENT[name])
    expected = np.where(RAMP == 0, 255, RAMP) if "level" in name else ON_WHITE
    assert np.abs((pixels if pixels.ndim == 2 else pixels[:, :, 0]) - expected).mean() < 4


def test_one_bit_images_are_black_and_white() -> None:
    bits = np.tile(np.array([0b11110000], np.uint8), (HEIGHT, WIDTH // 8))
    bars = np.tile(np.repeat(np.array([255, 0]), 4), (HEIGHT, WIDTH // 8))
    assert np.abs(shown(png(bits, depth=1))[0] - bars).max() <= 12
    transparent = png(bits, chunk(b"tRNS", b"\0\0"), depth=1)  # black is transparent
    assert shown(transparent)[0].min() > 250
    pbm = b"P4 64 16\n" + (255 - bits).tobytes()
    assert np.abs(shown(pbm)[0] - bars).max() <= 12
    for photometric, wanted in ((0, 255 - bars), (1, bars)):
        out = io.BytesIO()
        Image.fromarray(wanted.astype(np.uint8)).convert("1").save(out, "TIFF", tiffinfo={262: photometric})
        assert np.abs(shown(out.getvalue())[0] - wanted).max() <= 12


# Profiles


def cmyk_profile() -> bytes:
    """Return an ICC profile (v2) in which cyan ink prints as red, so that applying the profile is detectable.

    It has a table of two points per ink from CMYK to L*a*b* (lut8Type, ICC.1:2001-04, 6.5.8): no ink is white, cyan
    is red, and any other combination is black.
    """
    corners = []
    for corner in range(16):
        cyan, others = corner >> 3 & 1, corner & 7
        corners += [0, 128, 128] if others else [135, 208, 195] if cyan else [255, 128, 128]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + bytes(corners) + identity * 3
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(4 + 4 + 2 + 1 + 67)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, body = b"", b""
    for name, unpadded in ((b"desc", text), (b"A2B0", table), (b"wtpt", white), (b"cprt", b"text" + bytes(8))):
        content = unpadded + bytes(-len(unpadded) % 4)
        tags += name + struct.pack(">II", 128 + 4 + 12 * 4 + len(body), len(content))
        body += content
    rest = struct.pack(">I", 4) + tags + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"lcms", 0x02200000, b"prtr", b"CMYK", b"Lab ")
    head += (
        struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(4 * 7 - 4 + 4)
        + struct.pack(">3i", 63190, 65536, 54061)
    )
    return head + bytes(128 - len(head)) + rest


def display_p3() -> bytes:
    """Return the sRGB profile with Display P3's primaries (D50-adapted), under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for name, values in primaries.items():
        at = profile.index(name)
        offset = int.from_bytes(profile[at + 4 : at + 8], "big")
        profile[offset + 8 : offset + 20] = struct.pack(">3i", *(round(v * 65536) for v in values))
    return (
        bytes(profile)
        .replace("sRGB".encode("utf-16-be"), "sXGB".encode("utf-16-be"))
        .replace(b"sRGB built", b"sXGB built")
    )


CYAN = Image.new("CMYK", (32, 32), (255, 0, 0, 0))


def color(data: bytes, rules: ImageRules = RULES) -> tuple[list[float], str | None]:
    image = accept(data, rules)
    pixels = np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"), np.float64)
    return pixels.mean(axis=(0, 1)).round().tolist(), image.repair


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_with_its_icc_profile(kind: str) -> None:
    (red, green, blue), repair = color(saved(CYAN, kind, icc_profile=cmyk_profile()))
    assert red > 200
    assert max(green, blue) < 90
    assert repair == ("CMYK JPEG" if kind == "JPEG" else "TIFF")


def test_cmyk_without_a_profile_is_converted_by_the_default_formula() -> None:
    (red, green, blue), _ = color(saved(CYAN, "JPEG"))
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize(
    ("profile", "note"),
    [
        (cmyk_profile()[:300], "damaged ICC profile not applied"),
        (b"no profile at all", "damaged ICC profile not applied"),
        (display_p3(), "ICC profile for another color space not applied"),
    ],
)
def test_the_repair_reason_names_a_profile_that_was_not_applied(profile: bytes, note: str) -> None:
    (red, green, blue), repair = color(saved(CYAN, "JPEG", icc_profile=profile))
    assert repair == f"CMYK JPEG: {note}"
    assert red < 10
    assert min(green, blue) > 245


def test_reencoded_wide_gamut_images_are_converted_to_srgb() -> None:
    """The expected values are computed as in CSS Color 4. (200, 100, 50) of Display P3 is slightly outside of sRGB."""
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    for data, rules in (
        (saved(image, icc_profile=display_p3()), RULES),
        (saved(image, "JPEG", quality=95, icc_profile=display_p3()), ImageRules(max_side=16)),
    ):
        found, _ = color(data, rules)
        assert np.abs(np.array(found) - expected_srgb((200, 100, 50))).max() <= 3
    assert np.abs(expected_srgb((200, 100, 50)) - (200, 100, 50)).max() > 8


def expected_srgb(p3: tuple[int, int, int]) -> NDArray[np.float64]:
    """Convert Display P3 to sRGB with the matrices of CSS Color 4."""
    encoded = np.array(p3) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = [[1.2249401, -0.2249404, 0], [-0.0420569, 1.0420571, 0], [-0.0196376, -0.0786361, 1.0982735]]
    srgb = (np.array(matrix) @ linear).clip(0, 1)
    return 255 * np.where(srgb <= 0.0031308, srgb * 12.92, 1.055 * srgb ** (1 / 2.4) - 0.055)


def test_kept_wide_gamut_jpegs_are_unchanged() -> None:
    data = saved(Image.new("RGB", (32, 32), (200, 100, 50)), "JPEG", icc_profile=display_p3())
    assert accept(data, RULES).data == data


def test_lab_images_are_converted_to_srgb() -> None:
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(Image.new("RGB", (32, 32), (180, 90, 60)), lab)
    found, _ = color(saved(image, "TIFF"))
    assert np.abs(np.array(found) - (180, 90, 60)).max() <= 4


@pytest.mark.parametrize("tags", [{254: (LONG, 1, 1), 330: (LONG, 1, 8)}, {50706: (LONG, 1, 0x0401)}])
def test_camera_raw_files_are_rejected_instead_of_using_their_preview(tags: dict[int, tuple[int, int, int]]) -> None:
    """NEF, ARW, PEF, and DNG files are TIFFs whose first image is a thumbnail."""
    plain = {256: (LONG, 1, 8), 257: (LONG, 1, 8), 258: (SHORT, 1, 8), 259: (SHORT, 1, 1), 262: (SHORT, 1, 1)}
    plain |= {277: (SHORT, 1, 1), 278: (LONG, 1, 8), 279: (LONG, 1, 64)}

    def of(more: dict[int, tuple[int, int, int]]) -> bytes:
        entries = plain | more
        start = 8 + 2 + 12 * (len(entries) + 1) + 4
        return tiff(entries | {273: (LONG, 1, start)}, bytes(64))

    assert accept(of({}), RULES).width == 8
    with pytest.raises(Rejected, match="raw file"):
        accept(of(tags), RULES)
