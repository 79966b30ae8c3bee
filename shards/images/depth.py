"""What samples of more than 8 bits, or of floating point, are meant to be: which is black, and which is white."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from shards.images.rules import Rejected

_SMIN, _SMAX = 340, 341  # TIFF tags SMinSampleValue and SMaxSampleValue
_MAX_SAMPLE = 281  # MaxSampleValue
_SAMPLE_FORMAT, _SIGNED = 339, 2
_WHITE_IS_ZERO = 0


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """What a file says about its samples."""

    stored: int = 8
    """Bits that each sample takes in the file."""
    bits: int | None = None
    """Bits that its values have, where the file says so."""
    ends: tuple[float, float] | None = None
    """Values of black and white, where the file says so."""
    inverted: bool = False
    """Whether zero is white (and Pillow leaves that to its caller)."""
    unsigned: bool = False
    """Whether 32-bit samples are unsigned, which Pillow takes for signed ones."""
    left_aligned: bool = False
    """Whether writers that keep to the format shift values of fewer bits up to all bits stored, as in PNG."""


@dataclass(frozen=True)
class SampleRule:
    """An 8-bit value is (sample - black) * 255 / (white - black), or the sample without its lowest bits."""

    black: float
    white: float
    shift: int | None = None
    inverted: bool = False

    @classmethod
    def of_bits(cls, bits: int, inverted: bool = False) -> SampleRule:
        """The rule for whole numbers of so many bits."""
        return cls(0, (1 << bits) - 1, bits - 8 if bits >= 8 else None, inverted)

    def apply(self, samples: NDArray[Any]) -> NDArray[np.uint8]:
        """uint8, in the shape of the samples."""
        if self.shift is not None:
            values = (samples >> self.shift).clip(0, 255).astype(np.uint8)
        else:
            scaled = (samples.astype(np.float64) - self.black) * (255 / (self.white - self.black))
            values = np.rint(scaled).clip(0, 255).astype(np.uint8)
        return 255 - values if self.inverted else values


def read_sample_format(image: Image.Image, data: bytes) -> SampleFormat:
    """Read what a file says about its samples (PNG's IHDR and sBIT, TIFF's tags)."""
    if image.format == "PNG":
        return _of_png(data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _of_tiff(image)
    return SampleFormat(stored={"I;16": 16, "I;16B": 16, "I;16L": 16, "I": 16, "F": 32}.get(image.mode, 8))


def _of_png(data: bytes) -> SampleFormat:
    """PNG (third edition), 11.2.1 and 11.3.2.6."""
    stored, at = data[24], 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"sBIT" and 1 <= size <= 4 and data[at + 8] <= stored:
            bits = max(data[at + 8 : at + 8 + min(size, 3)])
            return SampleFormat(stored=stored, bits=bits if 8 <= bits < stored else None, left_aligned=True)
        at += 12 + size
    return SampleFormat(stored=stored)


def _of_tiff(image: TiffImagePlugin.TiffImageFile) -> SampleFormat:
    """TIFF 6.0, sections 8 and 19."""
    tags = image.tag_v2
    stored = max(_numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE)) or [1])
    low, high = _numbers(tags.get(_SMIN)), _numbers(tags.get(_SMAX))
    ends = (min(low or [0.0]), max(high)) if high else None
    if ends is not None and not (np.isfinite(ends).all() and ends[0] < ends[1]):
        ends = None
    # MaxSampleValue is a statistic: it says how many bits the values have, but not which one is white.
    largest = max(high or _numbers(tags.get(_MAX_SAMPLE)) or [0.0])
    bits = int(largest).bit_length() if 0 < largest < 2**32 else 0
    signed = tags.get(_SAMPLE_FORMAT) in (_SIGNED, (_SIGNED,))
    wide = image.mode == "F" or image.mode[0] == "I"
    return SampleFormat(
        stored=int(stored) - signed,
        unsigned=stored == 32 and not signed,
        bits=max(bits, 8) if bits else (int(stored) if 8 < stored < 16 else None),
        ends=ends,
        inverted=wide and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO,
    )


def _numbers(value: object) -> list[float]:
    """A tag's values; of anything but numbers, none."""
    values = value if isinstance(value, tuple) else (value,)
    try:
        return [float(one) for one in values if one is not None]
    except (TypeError, ValueError, ZeroDivisionError):
        return []


def sample_rule(image: Image.Image, statement: SampleFormat, bands: Iterable[Image.Image]) -> tuple[SampleRule, list[str]]:
    """The rule for a one-channel image of mode I or F, and notes about what was assumed.

    Raises:
        Rejected: it is not known which values are black and white.
    """
    low, high, used = _extremes(bands, statement)
    if image.mode == "F":
        ends = statement.ends or ((0.0, 1.0) if low >= 0 and high <= 1 else None)
        if ends is None or not np.isfinite((low, high)).all():
            raise Rejected(
                f"floating-point samples from {low:g} to {high:g}: expected 0 to 1, or the TIFF tags SMinSampleValue "
                "and SMaxSampleValue"
            )
        return SampleRule(*ends, inverted=statement.inverted), []
    if low < 0:
        if statement.ends is None:
            raise Rejected(
                f"signed samples from {low:g} to {high:g}: expected none below 0, or the TIFF tags SMinSampleValue and "
                "SMaxSampleValue"
            )
        return SampleRule(*statement.ends, inverted=statement.inverted), []
    bits, notes = _bits(int(high), statement, used)
    return SampleRule.of_bits(bits, statement.inverted), notes


def _bits(high: int, statement: SampleFormat, used: bool) -> tuple[int, list[str]]:
    stored = statement.stored
    fits = statement.bits is not None and high < 1 << statement.bits
    if fits and (used or not statement.left_aligned):
        assert statement.bits is not None
        return statement.bits, []
    if stored <= 16:
        bits = max(high.bit_length(), 8)
        dark = f", though no sample needs more than {bits}" if bits <= stored - 4 and statement.bits is None else ""
        return stored, [f"upper 8 of {stored} bits kept{dark}"]
    # 32 bits are hardly ever filled: they are what some software always writes.
    bits = next(bits for bits in (8, 16, stored) if high < 1 << bits)
    return bits, [f"{stored} bits taken for {bits}, which is all that its samples need"]


def samples_of(band: Image.Image, statement: SampleFormat) -> NDArray[Any]:
    """The samples of a band of mode I or F, [H, W]."""
    samples: NDArray[Any] = np.asarray(band)
    return samples.view(np.uint32) if statement.unsigned and samples.dtype == np.int32 else samples


def _extremes(bands: Iterable[Image.Image], statement: SampleFormat) -> tuple[float, float, bool]:
    """Smallest and largest sample, and whether bits are used that left-aligned values of so few bits leave zero."""
    low, high, used = np.inf, -np.inf, False
    mask = (1 << (statement.stored - (statement.bits or statement.stored))) - 1
    for band in bands:
        samples = samples_of(band, statement)
        low, high = min(low, float(samples.min())), max(high, float(samples.max()))
        if samples.dtype.kind == "f":
            if not np.isfinite(samples).all():
                return np.nan, np.nan, False
        else:
            used = used or bool((samples & mask).any())
    return low, high, used
