"""Check numeric options against the ranges in their field annotations.

    @dataclass(frozen=True)
    class Options:
        epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300

        def __post_init__(self) -> None:
            check_ranges(self)

A number out of range is rejected when the options are constructed, whether they come from the command line, a TOML
file, JSON or code, before anything is written or allocated. Pydantic checks the same declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Interval

from shards.errors import UserError
from shards.redact import printable

MAX_SHOWN = 60  # maximum length of a value in a message, in characters

Fraction = Annotated[float, Interval(ge=0, le=1)]
"""A fraction or a probability."""
Decay = Annotated[float, Interval(ge=0, lt=1)]
"""A decay rate, or a fraction below 1."""
Seed = Annotated[int, Interval(ge=0, lt=1 << 63)]
Steps = Annotated[int, Interval(ge=1, le=10**12)]
"""Number of optimizer steps."""
Seconds = Annotated[float, Interval(ge=0, le=10**8)]
"""Duration in seconds, up to three years, which all system timers support."""
Side = Annotated[int, Interval(ge=1, le=8192)]
"""Side of a square image, in pixels."""
ModelSide = Annotated[int, Interval(ge=32, le=8192)]
"""Side of a model's square input images, in pixels; FAT downsamples images by a factor of 32."""
CropPct = Annotated[float, Interval(ge=0.1, le=1)]
"""Fraction of the short side that the center crop of an evaluation keeps. Images are first resized to size / crop_pct
pixels, so a small one would make them huge."""
MAX_BATCH = 1_000_000
Batch = Annotated[int, Interval(ge=1, le=MAX_BATCH)]
"""Batch size in images."""


def check_ranges(options: Any) -> None:
    """Raise an error if a number in a field of a dataclass is outside the range of the field.

    Raises:
        UserError: a number is out of range; the message contains the option, its value and the allowed range.
    """
    kind: type = type(options)
    for name, hint in _numeric_fields(kind):
        value = getattr(options, name)
        allowed = _first_violated_range(value, hint)
        if allowed is not None:
            given = " ".join(map(_format_number, value if isinstance(value, tuple) else (value,)))
            given = printable(given if len(given) <= MAX_SHOWN else given[:MAX_SHOWN] + "...")
            raise UserError(f"--{name.replace('_', '-')} {given}: expected {allowed}")


def ranges_of(hint: Any) -> Iterator[tuple[type, Interval | None]]:
    """Yield (int or float, range) for every number in a type; the range is None if the number has none."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *metadata = typing.get_args(hint)
        interval = next((entry for entry in metadata if isinstance(entry, Interval)), None)
        for kind, inner in ranges_of(base):
            yield kind, inner or interval
    elif hint in (int, float):
        yield hint, None
    elif origin in (types.UnionType, typing.Union, tuple):
        for part in typing.get_args(hint):
            yield from ranges_of(part)


@functools.cache
def _numeric_fields(options: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(options, include_extras=True)
    names = [field.name for field in dataclasses.fields(options)]
    return [(name, hints[name]) for name in names if any(True for _ in ranges_of(hints[name]))]


def _first_violated_range(value: Any, hint: Any) -> str | None:
    """Describe the range of the first number that is out of its range; None if all are in range."""
    ranges = list(ranges_of(hint))
    values = value if isinstance(value, tuple) else (value,)
    one_range_each = len(ranges) == len(values)
    for number, (kind, interval) in zip(values, ranges if one_range_each else ranges * len(values), strict=False):
        if isinstance(number, int | float) and interval is not None and not _within(number, interval):
            each = "each " if len(values) > 1 else ""
            return f"{each}{_describe_range(kind, interval)}"
    return None


def _within(number: float, interval: Any) -> bool:
    """Return whether a number is in a range. False for NaN, because every comparison with NaN is False."""
    return (
        (interval.ge is None or number >= interval.ge)
        and (interval.gt is None or number > interval.gt)
        and (interval.le is None or number <= interval.le)
        and (interval.lt is None or number < interval.lt)
    )


def _describe_range(kind: type, interval: Interval) -> str:
    low = f"from {_format_bound(interval.ge)}" if interval.ge is not None else f"above {_format_bound(interval.gt)}"
    high = f"to {_format_bound(interval.le)}" if interval.le is not None else f"and below {_format_bound(interval.lt)}"
    return f"{'a whole number' if kind is int else 'a number'} {low} {high}"


def _format_number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_bound(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:,g}"
