"""The interface of all decoders. Crop windows, sizes and flips are part of the job; decoders draw no random numbers."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.reader import Encoded
from shards.errors import UserError

if TYPE_CHECKING:  # not at run time: `pipeline.jobs` must not import torch
    import torch

T = TypeVar("T")

SHOWN_IDS = 8


class DecodeError(UserError):
    """A batch could not be decoded."""

    @classmethod
    def of(cls, ids: Iterable[int], detail: str) -> DecodeError:
        """Return an error that names the samples.

        Args:
            ids: ids of the samples, one of which (at least) could not be decoded.
            detail: the reason.
        """
        listed = [str(int(i)) for i in ids]
        more = f" and {len(listed) - SHOWN_IDS} more" if len(listed) > SHOWN_IDS else ""
        which = "sample" if len(listed) == 1 else "one of samples"
        return cls(
            f"{which} {', '.join(listed[:SHOWN_IDS])}{more} could not be decoded ({detail}); "
            "check the set with 'pipeline verify'"
        )


@dataclass(frozen=True)
class DecodeJob:
    """The decoding work of a batch of n images.

    The crop window of each image is decoded, and its region is resized to the output size. At the borders of the region
    the filter also reads pixels of the window outside the region, so the result equals resizing the whole window and
    cropping the output from it. In training, the region is the whole window.
    """

    encoded: Encoded
    """The encoded images."""
    window: NDArray[np.int32]
    """int32 [n, 4]: y, x, height, width of the crop window, in source pixels."""
    size: int
    """Side of the output in pixels, equal for all images of the batch. It may differ from batch to batch."""
    flip: NDArray[np.bool_] | None = None
    """bool [n]: whether to flip horizontally. None: no image is flipped."""
    region: NDArray[np.float64] | None = None
    """float64 [n, 4]: y, x, height, width of the part of the window that is resized to the output, in pixels of the
    window. None: the whole window."""

    def resized_windows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute the size of each window after resizing its region to the output, and the region's corner in it.

        Returns:
            float64 [n, 2] (height, width) and float64 [n, 2] (y, x). If all four are whole numbers, the output can be
            computed by resizing the window and cropping.
        """
        if self.region is None:
            return np.full((len(self.window), 2), float(self.size)), np.zeros((len(self.window), 2))
        scale = self.size / self.region[:, 2:]
        return self.window[:, 2:] * scale, self.region[:, :2] * scale


@dataclass(frozen=True)
class Normalization:
    """Normalization of 8-bit pixels: (pixels / 255 - mean) / std, per channel."""

    mean: tuple[float, float, float]
    """Mean of red, green and blue, 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation of red, green and blue, for values in 0 to 1."""


IDENTITY = Normalization(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
"""Leaves pixel values in 0 to 255."""


class Decoder(Protocol):
    """Decodes a stream of jobs into a stream of batches, in the same order."""

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs in order.

        Args:
            jobs: pairs of a job and any object that belongs to it.

        Yields:
            images: uint8 [n, size, size, 3] with the job's size, RGB, on the decoder's device; float32 if the decoder
                normalizes. The decoder does not use them again.
            job, extra: the pair that was passed in.

        Raises:
            DecodeError: a batch could not be decoded. The stream ends with this error; no batch is skipped.
        """
        ...
