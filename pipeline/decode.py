"""What decoders are asked for, whoever they are: windows, sizes and flips are handed in, nothing is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.reader import Encoded
from shards.errors import UserError

if TYPE_CHECKING:  # `pipeline.jobs` runs without torch
    import torch

T = TypeVar("T")

SHOWN_IDS = 8


class DecodeError(UserError):
    """A batch could not be decoded."""

    @classmethod
    def of(cls, ids: Iterable[int], detail: str) -> DecodeError:
        """Name the samples; decoders know them by their place only."""
        listed = [str(int(i)) for i in ids]
        more = f" and {len(listed) - SHOWN_IDS} more" if len(listed) > SHOWN_IDS else ""
        which = "sample" if len(listed) == 1 else "one of samples"
        return cls(
            f"{which} {', '.join(listed[:SHOWN_IDS])}{more} could not be decoded ({detail}); "
            "run 'pipeline verify' on the set"
        )


@dataclass(frozen=True)
class DecodeJob:
    """What becomes of each image of a batch. All arrays have n rows.

    The window is cut from the image, resized to `resize` and, where that is larger than the output, cut to the output
    size at `anchor`. Training hands in random windows and resizes them to the output size; evaluation hands in whole
    images.
    """

    encoded: Encoded
    window: NDArray[np.int32]
    """int32 [n, 4]: y, x, height, width in source pixels."""
    flip: NDArray[np.bool_] | None = None
    """bool [n]; None = nowhere."""
    resize: NDArray[np.int32] | None = None
    """int32 [n, 2]: height, width after resizing; None = the output size."""
    anchor: NDArray[np.int32] | None = None
    """int32 [n, 2]: y, x of the output's corner in the resized image; goes with `resize`."""


@dataclass(frozen=True)
class Normalisation:
    """What decoders may do to the pixels at the end: (pixels / 255 - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Decoder(Protocol):
    """Turns a stream of jobs into a stream of batches, in order."""

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Iterator[tuple[torch.Tensor, DecodeJob, T]]:
        """Decode jobs.

        Yields:
            images: uint8 [n, size, size, 3], RGB, on the decoder's device; float32 where it normalises. The caller's.
            job, extra: as they came.

        Raises:
            DecodeError: a batch could not be decoded. The stream ends there, nothing is skipped.
        """
        ...
