"""Convert the pixels of any image to 8-bit grayscale or RGB.

- More than 8 bits: scaled by the significant bits that the file states (PNG's sBIT, TIFF's BitsPerSample and
  SMaxSampleValue); if it states none, the upper 8 bits are kept.
- Floating point: the range is 0 to 1, or TIFF's SMinSampleValue to SMaxSampleValue.
- Transparent pixels are composited onto white.
- CMYK and RGB with an ICC profile are converted to sRGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from shards.images.depth import SampleRule, read_sample_format, sample_rule, samples_of
from shards.images.formats import PILLOW_FORMATS
from shards.images.limits import MAX_DECODE_MEMORY

Pixels = NDArray[np.uint8]
"""uint8 [H, W, C], C = 1 (grayscale) or 3 (RGB)."""

BAND_PIXELS = 2**20  # pixels converted at a time, to avoid a second copy of a large image

_BLANK_PIXELS = 16  # minimum pixels, after reduction by 8 per side, to decide whether an image is blank
_BLACK = 20  # largest value (0 to 255) in a nearly black image
_ONE_COLOR = 3  # largest range of values (0 to 255) in an image of a single color

_DEEP_BYTES = 14  # bytes of memory per pixel: 16-bit RGB decoded twice, and the result
_OPPOSITE_ORDER = {"16B": "16L", "16L": "16B", "16N": "16B"}  # Pillow's names of byte orders; N is native


def to_8bit(image: Image.Image, data: bytes) -> tuple[Pixels, list[str]]:
    """Convert a loaded image in bands of rows.

    Args:
        image: image of any mode.
        data: content of the image file.

    Returns:
        The pixels, and notes on precision that was lost and profiles that were not applied.

    Raises:
        Rejected: the sample values of black and white are unknown.
    """
    fmt = read_sample_format(image, data)
    if image.mode == "F" or image.mode[0] == "I":
        rule, notes = sample_rule(image, fmt, _bands(image))
        return _converted(image, lambda band: rule.apply(samples_of(band, fmt))[:, :, None]), notes
    if image.mode == "RGB" and fmt.stored == 16 and fmt.bits is not None and fmt.bits > 8:
        deep = _deep_rgb(image, data, fmt.bits)
        if deep is not None:
            return deep, []
    convert, notes = _profile_transform(image)
    notes += [f"upper 8 of {fmt.stored} bits kept"] if fmt.stored > 8 else []
    return _converted(image, lambda band: _convert_band(band, convert)), notes


def is_blank(pixels: Pixels) -> bool:
    """Return whether an image is nearly black or of a single color, given every eighth pixel along each side.

    Very small images have too few such pixels to decide, so they are never considered blank.
    """
    if pixels.shape[0] * pixels.shape[1] < _BLANK_PIXELS:
        return False
    highest = pixels.max(axis=(0, 1)).astype(np.int64)
    return bool(highest.max() <= _BLACK or np.all(highest - pixels.min(axis=(0, 1)) <= _ONE_COLOR))


def profile_of(image: Image.Image) -> bytes | None:
    """Return the ICC profile of an opened image, if it has one."""
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile else None


def to_srgb(pixels: Pixels, profile: bytes | None) -> Pixels:
    """Convert uint8 [H, W, 3] from a profile's colors to sRGB; unchanged if the profile is invalid or sRGB itself."""
    transform, _ = _transform(profile, "RGB", "RGB ")
    if transform is None:
        return pixels
    return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    if rows >= height:
        yield image
        return
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        band.info = image.info
        yield band


def _converted(image: Image.Image, convert: Callable[[Image.Image], Pixels]) -> Pixels:
    pixels: Pixels | None = None
    top = 0
    for band in _bands(image):
        part = convert(band)
        if len(part) == image.height:
            return part
        if pixels is None:
            pixels = np.empty((image.height, image.width, part.shape[2]), np.uint8)
        pixels[top : top + len(part)] = part
        top += len(part)
    assert pixels is not None
    return pixels


def _convert_band(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Pixels:
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))[:, :, None]
    if transform is not None:
        image = image if image.mode == transform.input_mode else image.convert(transform.input_mode)
        return np.asarray(ImageCms.applyTransform(image, transform))
    return np.asarray(image.convert("RGB"))


def _profile_transform(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform | None, list[str]]:
    """Return the transform of the image's colors to sRGB (None if not needed), and notes."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), []
    if image.mode == "CMYK":
        return _transform(profile_of(image), "CMYK", "CMYK")
    if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA"):
        return _transform(profile_of(image), "RGB", "RGB ")
    return None, []


def _transform(profile: bytes | None, mode: str, space: str) -> tuple[ImageCms.ImageCmsTransform | None, list[str]]:
    if profile is None:
        return None, []
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != space:
            return None, ["ICC profile for another color space not applied"]
        if "sRGB" in (opened.profile.profile_description or ""):
            return None, []
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB"), []
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return None, ["damaged ICC profile not applied"]


def _deep_rgb(image: Image.Image, data: bytes, bits: int) -> Pixels | None:
    """Convert 16-bit RGB whose samples have only `bits` significant bits; None if they use all 16.

    Pillow keeps only the upper byte of each sample. Decoding with the opposite byte order gives the lower byte.
    """
    width, height = image.size
    if width * height * _DEEP_BYTES > MAX_DECODE_MEMORY or np.asarray(image).max() >= 1 << (bits - 8):
        return None
    swapped = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    if swapped.size != image.size:
        return None
    tiles = []
    for tile in swapped.tile:
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        mode, _, order = str(args[0]).partition(";")
        if mode != "RGB" or order not in _OPPOSITE_ORDER:
            return None
        named = f"RGB;{_OPPOSITE_ORDER[order]}"
        tiles.append(tile._replace(args=(named, *args[1:]) if isinstance(tile.args, tuple) else named))
    swapped.tile = tiles
    swapped.load()
    rule = SampleRule.of_bits(bits)
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        upper, lower = (np.asarray(one.crop(box)).astype(np.uint16) for one in (image, swapped))
        pixels[box[1] : box[3]] = rule.apply(upper << 8 | lower)
    return pixels
