"""Small images in the formats that devices, programs, and web sites write; each is a function of its seed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

WIDTH, HEIGHT = 48, 40
GRAY = (120, 120, 120)


def noise(seed: int, color: tuple[int, int, int] = GRAY, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Return an RGB image of two tones and noise, whose mean is `color`."""
    mean = np.array(color)
    grain = np.random.default_rng(seed).integers(-12, 13, (size[1], size[0], 1))
    tone = np.minimum(30, np.minimum(mean, 255 - mean))
    side = np.where(np.arange(size[0]) < size[0] // 2, 1, -1)[:, None]
    return Image.fromarray((mean + grain + tone * side).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def in_format(kind: str, color: tuple[int, int, int] = GRAY, **how: Any) -> Callable[[int], bytes]:
    """Return an encoder, seed -> file, for a format of Pillow."""
    return lambda seed: encoded(noise(seed, color), kind, **how)


def jpeg(seed: int) -> bytes:
    return encoded(noise(seed, size=(WIDTH + seed % 16, HEIGHT)), "JPEG", quality=85)


def one_pixel_gif(seed: int) -> bytes:
    return encoded(noise(seed, size=(1, 1)), "GIF")


def colored(color: tuple[int, int, int]) -> Callable[[int], bytes]:
    return in_format("JPEG", color)


def heic(color: tuple[int, int, int]) -> Callable[[int], bytes]:
    """Return an encoder of HEIC photos like those of iPhones."""
    from pillow_heif import from_pillow

    def encode(seed: int) -> bytes:
        out = io.BytesIO()
        from_pillow(noise(seed, color, (64, 48))).save(out, quality=90)
        return out.getvalue()

    return encode


def pages(*colors: tuple[int, int, int]) -> Callable[[int], bytes]:
    """Return an encoder of a TIFF with one page per color."""

    def encode(seed: int) -> bytes:
        first, *others = [noise(seed + i, color) for i, color in enumerate(colors)]
        return encoded(first, "TIFF", save_all=True, append_images=others, compression="tiff_lzw")

    return encode


def animated(kind: str, *colors: tuple[int, int, int]) -> Callable[[int], bytes]:
    """Return an encoder of an animation (GIF, WEBP, or PNG) with one frame per color."""

    def encode(seed: int) -> bytes:
        first, *others = [noise(seed + i, color) for i, color in enumerate(colors)]
        return encoded(first, kind, save_all=True, append_images=others, duration=100, loop=0)

    return encode


def ramp(top: int, seed: int) -> NDArray[np.int64]:
    """Return all values from 0 to `top` in random order, int64 [H, W]."""
    values = np.linspace(0, top, WIDTH * HEIGHT).round().astype(np.int64)
    return np.random.default_rng(seed).permutation(values).reshape(HEIGHT, WIDTH)


def deep(kind: str, top: int) -> Callable[[int], bytes]:
    """Return an encoder of 16-bit grayscale images with values up to `top`."""
    return lambda seed: encoded(Image.fromarray(ramp(top, seed).astype(np.uint16)), kind)


def floating(seed: int) -> bytes:
    """Return a TIFF of float32 from 0 to 1, as written by ImageJ and scikit-image."""
    return encoded(Image.fromarray((ramp(255, seed) / 255).astype(np.float32)), "TIFF")


def bilevel(seed: int) -> bytes:
    """Return a fax page: 1 bit, CCITT group 4."""
    return encoded(Image.fromarray(ramp(255, seed).astype(np.uint8)).convert("1"), "TIFF", compression="group4")


def raw_photo(maker: str) -> Callable[[int], bytes]:
    """Return an encoder of camera raw files, which TIFF readers see as a thumbnail followed by other data."""

    def encode(seed: int) -> bytes:
        tags = {254: 1, 271: maker, 272: f"{maker} X100"}  # NewSubfileType: reduced resolution; Make; Model
        return encoded(noise(seed, size=(32, 24)), "TIFF", tiffinfo=tags) + bytes(2000)

    return encode


def cut_out(seed: int) -> bytes:
    """Return a red square on transparent black."""
    image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    image[: HEIGHT // 2] = (200, 0, seed % 3, 255)
    return encoded(Image.fromarray(image), "PNG")


def cmyk(inks: tuple[int, int, int, int], profile: bytes = b"") -> Callable[[int], bytes]:
    """Return an encoder of CMYK JPEGs for print, inverted like those of Adobe's programs."""

    def encode(seed: int) -> bytes:
        image = Image.new("CMYK", (WIDTH, HEIGHT), inks)
        image.putpixel((seed % WIDTH, 0), (0, 0, 0, 0))
        return encoded(image, "JPEG", quality=95, **({"icc_profile": profile} if profile else {}))

    return encode


@cache
def press_profile() -> bytes:
    """Return an ICC profile similar to an offset press (ICC.1:2001-04, lut8Type), less saturated than sRGB."""
    paper = {  # L*a*b* of full inks, C M Y
        (0, 0, 0): (95, 0, 0),
        (1, 0, 0): (55, -37, -50),
        (0, 1, 0): (48, 74, -3),
        (0, 0, 1): (89, -5, 93),
        (0, 1, 1): (47, 68, 48),
        (1, 0, 1): (50, -68, 33),
        (1, 1, 0): (24, 22, -46),
        (1, 1, 1): (23, 0, 0),
    }
    grid = bytearray()
    for corner in np.ndindex(2, 2, 2, 2):
        light = 0.15 if corner[3] else 1.0
        lightness, a, b = (value * light for value in paper[corner[:3]])
        grid += bytes([round(lightness * 2.55), round(a) + 128, round(b) + 128])
    ramp_table = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp_table * 4 + bytes(grid) + ramp_table * 3
    text = b"desc" + bytes(4) + struct.pack(">I", 6) + b"press\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, body, start = b"", b"", 128 + 4 + 12 * 3
    for name, data in ((b"desc", text), (b"wtpt", white), (b"A2B0", table)):
        tags += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = bytes(4) + bytes(4) + bytes.fromhex("02400000") + b"prtrCMYKLab " + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    header += bytes(128 - len(header))
    profile = header + struct.pack(">I", 3) + tags + body
    return struct.pack(">I", len(profile)) + profile[4:]


def on_screen(inks: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Return the sRGB color of inks with `press_profile`."""
    press = ImageCms.ImageCmsProfile(io.BytesIO(press_profile()))
    shown = ImageCms.profileToProfile(
        Image.new("CMYK", (1, 1), inks), press, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert shown is not None
    red, green, blue = np.asarray(shown)[0, 0].tolist()
    return red, green, blue


def with_film(seed: int) -> bytes:
    """Return a motion photo: a JPEG followed by an MP4."""
    return jpeg(seed) + b"\0\0\0\x18ftypmp42" + zlib.compress(bytes(5000))


def film(brand: str = "qt  ") -> bytes:
    """Return the first bytes of a video file."""
    return b"\0\0\0\x14ftyp" + brand.encode() + bytes(500)
