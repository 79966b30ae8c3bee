"""Determine which sample values are black and white in images of more than 8 bits or of floating point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from shards.images.rules import Rejected

_SMIN, _SMAX = 340, 341  # TIFF tags SMinSampleValue and SMaxSampleValue
_MAX_SAMPLE = 281  # TIFF tag MaxSampleValue
_SAMPLE_FORMAT, _SIGNED = 339, 2
_WHITE_IS_ZERO = 0


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """How a file stores its samples, as far as its header states it."""

    stored: int = 8
    """Bits per sample in the file."""
    bits: int | None = None
    """Significant bits per sample; None if the file does not state them."""
    black_white: tuple[float, float] | None = None
    """Sample values of black and white; None if the file does not state them."""
    inverted: bool = False
    """Whether zero is white and Pillow does not invert the samples."""
    unsigned: bool = False
    """Whether 32-bit samples are unsigned, although Pillow reads them as signed."""
    left_aligned: bool = False
    """Whether the format requires values of fewer significant bits to be shifted left to fill all stored bits (PNG)."""


@dataclass(frozen=True)
class SampleRule:
    """Conversion of samples to 8 bits: (sample - black) * 255 / (white - black), or `sample >> shift`."""

    black: float
    white: float
    shift: int | None = None
    inverted: bool = False

    @classmethod
    def of_bits(cls, bits: int, inverted: bool = False) -> SampleRule:
        """Return the rule for unsigned integers of `bits` significant bits."""
        return cls(0, (1 << bits) - 1, bits - 8 if bits >= 8 else None, inverted)

    def apply(self, samples: NDArray[Any]) -> NDArray[np.uint8]:
        """Convert samples to uint8; the shape is kept."""
        if self.shift is not None:
            values = (samples >> self.shift).clip(0, 255).astype(np.uint8)
        else:
            scaled = (samples.astype(np.float64) - self.black) * (255 / (self.white - self.black))
            values = np.rint(scaled).clip(0, 255).astype(np.uint8)
        return 255 - values if self.inverted else values


def read_sample_format(image: Image.Image, data: bytes) -> SampleFormat:
    """Read the sample format from the header (PNG: IHDR and sBIT; TIFF: tags)."""
    if image.format == "PNG":
        return _of_png(data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _of_tiff(image)
    return SampleFormat(stored={"I;16": 16, "I;16B": 16, "I;16L": 16, "I": 16, "F": 32}.get(image.mode, 8))


def _of_png(data: bytes) -> SampleFormat:
    """Read the sample format of a PNG (third edition, 11.2.1 and 11.3.2.6)."""
    stored, at = data[24], 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"sBIT" and 1 <= size <= 4 and data[at + 8] <= stored:
            bits = max(data[at + 8 : at + 8 + min(size, 3)])
            return SampleFormat(stored=stored, bits=bits if 8 <= bits < stored else None, left_aligned=True)
        at += 12 + size
    return SampleFormat(stored=stored)


def _of_tiff(image: TiffImagePlugin.TiffImageFile) -> SampleFormat:
    """Read the sample format of a TIFF (TIFF 6.0, sections 8 and 19)."""
    tags = image.tag_v2
    stored = max(_numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE)) or [1])
    low, high = _numbers(tags.get(_SMIN)), _numbers(tags.get(_SMAX))
    black_white = (min(low or [0.0]), max(high)) if high else None
    if black_white is not None and not (np.isfinite(black_white).all() and black_white[0] < black_white[1]):
        black_white = None
    # MaxSampleValue is a statistic: it bounds the number of significant bits, but does not define the value of white.
    largest = max(high or _numbers(tags.get(_MAX_SAMPLE)) or [0.0])
    bits = int(largest).bit_length() if 0 < largest < 2**32 else 0
    signed = tags.get(_SAMPLE_FORMAT) in (_SIGNED, (_SIGNED,))
    wide = image.mode == "F" or image.mode[0] == "I"
    return SampleFormat(
        stored=int(stored) - signed,
        unsigned=stored == 32 and not signed,
        bits=max(bits, 8) if bits else (int(stored) if 8 < stored < 16 else None),
        black_white=black_white,
        inverted=wide and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO,
    )


def _numbers(value: object) -> list[float]:
    """Return the values of a tag as numbers; an empty list if they are not numbers."""
    values = value if isinstance(value, tuple) else (value,)
    try:
        return [float(one) for one in values if one is not None]
    except (TypeError, ValueError, ZeroDivisionError):
        return []


def sample_rule(image: Image.Image, fmt: SampleFormat, bands: Iterable[Image.Image]) -> tuple[SampleRule, list[str]]:
    """Return the rule for a one-channel image of mode I or F, and notes on the assumptions that were made.

    Raises:
        Rejected: the values of black and white are unknown.
    """
    low, high, low_bits_set = _extremes(bands, fmt)
    if image.mode == "F":
        black_white = fmt.black_white or ((0.0, 1.0) if low >= 0 and high <= 1 else None)
        if black_white is None or not np.isfinite((low, high)).all():
            raise Rejected(
                f"floating-point samples from {low:g} to {high:g}; expected 0 to 1, or the TIFF tags SMinSampleValue "
                "and SMaxSampleValue"
            )
        return SampleRule(*black_white, inverted=fmt.inverted), []
    if low < 0:
        if fmt.black_white is None:
            raise Rejected(
                f"signed samples from {low:g} to {high:g}; expected none below 0, or the TIFF tags SMinSampleValue and "
                "SMaxSampleValue"
            )
        return SampleRule(*fmt.black_white, inverted=fmt.inverted), []
    bits, notes = _bits(int(high), fmt, low_bits_set)
    return SampleRule.of_bits(bits, fmt.inverted), notes


def _bits(high: int, fmt: SampleFormat, low_bits_set: bool) -> tuple[int, list[str]]:
    stored = fmt.stored
    fits = fmt.bits is not None and high < 1 << fmt.bits
    if fits and (low_bits_set or not fmt.left_aligned):
        assert fmt.bits is not None
        return fmt.bits, []
    if stored <= 16:
        bits = max(high.bit_length(), 8)
        dark = f", although all samples fit in {bits} bits" if bits <= stored - 4 and fmt.bits is None else ""
        return stored, [f"upper 8 of {stored} bits kept{dark}"]
    # Some software always writes 32-bit samples, although their values rarely need 32 bits.
    bits = next(bits for bits in (8, 16, stored) if high < 1 << bits)
    return bits, [f"{stored}-bit samples converted as {bits}-bit samples, because all of them fit in {bits} bits"]


def samples_of(band: Image.Image, fmt: SampleFormat) -> NDArray[Any]:
    """Return the samples of a band of mode I or F, [H, W]."""
    samples: NDArray[Any] = np.asarray(band)
    return samples.view(np.uint32) if fmt.unsigned and samples.dtype == np.int32 else samples


def _extremes(bands: Iterable[Image.Image], fmt: SampleFormat) -> tuple[float, float, bool]:
    """Return the smallest and largest sample, and whether low bits that left-alignment requires to be zero are set."""
    low, high, low_bits_set = np.inf, -np.inf, False
    mask = (1 << (fmt.stored - (fmt.bits or fmt.stored))) - 1
    for band in bands:
        samples = samples_of(band, fmt)
        low, high = min(low, float(samples.min())), max(high, float(samples.max()))
        if samples.dtype.kind == "f":
            if not np.isfinite(samples).all():
                return np.nan, np.nan, False
        else:
            low_bits_set = low_bits_set or bool((samples & mask).any())
    return low, high, low_bits_set
