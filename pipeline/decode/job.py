"""What decoders are asked for, whoever they are: windows, sizes and flips are handed in, nothing is drawn."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.reader import Encoded
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

    The window is cut from the image, and its region is resized to the output size. Near the region's borders, the
    filter reads pixels of the window that lie outside of the region, so the result is the same as that of resizing the
    whole window and cutting the output from it. Training resizes whole random windows.
    """

    encoded: Encoded
    window: NDArray[np.int32]
    """int32 [n, 4]: y, x, height, width in source pixels."""
    flip: NDArray[np.bool_] | None = None
    """bool [n]; None = nowhere."""
    region: NDArray[np.float64] | None = None
    """float64 [n, 4]: y, x, height, width of what becomes the output, in pixels of the window; None = the window."""

    def resized_windows(self, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Size of each window when its region has `size` pixels a side, and the region's corner in it.

        Returns:
            float64 [n, 2] each: height and width, y and x. Whole numbers where resizing the window and cutting the
            output from it is possible.
        """
        if self.region is None:
            return np.full((len(self.window), 2), float(size)), np.zeros((len(self.window), 2))
        scale = size / self.region[:, 2:]
        return self.window[:, 2:] * scale, self.region[:, :2] * scale


@dataclass(frozen=True)
class Normalisation:
    """What decoders may do to the pixels at the end: (pixels / 255 - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Decoder(Protocol):
    """Turns a stream of jobs into a stream of batches, in order."""

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs.

        Yields:
            images: uint8 [n, size, size, 3], RGB, on the decoder's device; float32 where it normalises. The caller's.
            job, extra: as they came.

        Raises:
            DecodeError: a batch could not be decoded. The stream ends there, nothing is skipped.
        """
        ...
