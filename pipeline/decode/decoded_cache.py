"""A cache of whole decoded images in the memory of the decoder's device (`--gpu-cache`).

DALI's own cache (`cache_size`) cannot be used: it identifies an image by the file name that DALI's readers attach
(`source_info`), which `external_source` cannot set, and it never caches without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode.cached import CacheUse
from pipeline.decode.dali_graph import wrap_for_dali
from pipeline.plan import Ids
from shards.errors import UserError
from shards.memory import GIB

Ints = TypeVar("Ints", int, NDArray[np.int64])

CHANNELS = 3
# Start addresses are multiples of this, as those of CUDA's allocator.
ALIGNMENT = 256


@dataclass
class _Stored:
    """Memory of one image."""

    pixels: torch.Tensor
    """uint8 [height, width, 3], a view of the cache's memory."""
    for_dali: Any
    """The same memory, as a tensor of DALI."""
    written: bool = False


class DecodedCache:
    """Keeps the first decoded images that fit into its memory, in the order of the batches. None is replaced.

    Which images stay is therefore a function of the plan, the rank, the position at which the loader starts and the
    size of the memory. Every epoch delivers each sample once, in a new order, so an image that is cached now is as
    likely to be needed again as any other: replacing images could not increase the rate of hits.

    Not thread-safe. On a GPU, all calls use the same CUDA stream.

    Args:
        size: size of the memory in bytes, allocated at once.
        device: device of the memory.

    Raises:
        UserError: the device has less memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            free = f"; {torch.cuda.mem_get_info(device)[0] / GIB:.1f} GiB are free" if device.type == "cuda" else ""
            raise UserError(
                f"--gpu-cache {size / GIB:g}: {device} cannot allocate this memory{free}; choose a smaller cache"
            ) from error
        self._used = 0
        self._stored: dict[int, _Stored] = {}
        self.nothing = wrap_for_dali(torch.zeros(1, 1, CHANNELS, dtype=torch.uint8, device=device))
        """An image of one pixel, for rows that are not cached."""
        self._use = CacheUse()

    @property
    def use(self) -> CacheUse:
        """Numbers of samples requested and delivered so far, and bytes that are reserved for images."""
        return replace(self._use, stored_bytes=self._used)

    def take(self, ids: Ids) -> tuple[NDArray[np.bool_], list[Any]]:
        """Return which samples are cached, bool [n], and their images for DALI (`nothing` for the others)."""
        found = [self._stored.get(sample) for sample in ids.tolist()]
        hit = np.array([stored is not None and stored.written for stored in found])
        self._use.hits += int(hit.sum())
        self._use.samples += len(ids)
        return hit, [stored.for_dali if stored and stored.written else self.nothing for stored in found]

    def reserve(self, ids: Ids, heights: NDArray[np.integer], widths: NDArray[np.integer]) -> list[int]:
        """Reserve memory for those images of a batch that fit and have none; return their rows.

        Args:
            ids: int64 [n], sample ids.
            heights, widths: sizes of the images, [n].
        """
        rows, images = [], zip(ids.tolist(), heights.tolist(), widths.tolist(), strict=True)
        for row, (sample, height, width) in enumerate(images):
            start, size = self._used, image_bytes(height, width)
            if sample in self._stored or start + size > len(self._memory):
                continue
            pixels = self._memory[start : start + height * width * CHANNELS].view(height, width, CHANNELS)
            self._stored[sample] = _Stored(pixels, wrap_for_dali(pixels))
            self._used += size
            rows.append(row)
        return rows

    def store(self, sample: int, image: torch.Tensor) -> None:
        """Copy an image into the memory that was reserved for it.

        Args:
            sample: id of the sample.
            image: uint8 [height, width, 3], on the cache's device.
        """
        stored = self._stored[sample]
        stored.pixels.copy_(image)
        stored.written = True


def image_bytes(height: Ints, width: Ints) -> Ints:
    """Return the bytes of cache memory that an image needs, or each of several images."""
    return -(-height * width * CHANNELS // ALIGNMENT) * ALIGNMENT


def describe_capacity(size: int, heights: NDArray[np.integer], widths: NDArray[np.integer], *, world: int) -> str:
    """Describe how many images of a split a cache of `size` bytes holds, and the expected rate of hits.

    A cache that holds a fraction f of the split delivers a fraction f of the images once it is full. A rank gets a
    random part of 1 / `world` of the samples in each epoch, so it needs ln(1 - f) / ln(1 - 1 / world) epochs to see
    enough different images to fill the cache.

    Args:
        heights, widths: sizes of the split's images, [samples].
        world: number of ranks.
    """
    sizes = image_bytes(heights.astype(np.int64), widths.astype(np.int64))
    samples = len(sizes)
    fraction = min(1.0, size / max(1, int(sizes.sum())))
    shown = f"{size / GIB:g} GiB, about {int(fraction * samples):,} of {samples:,} images"
    if world == 1:
        return f"{shown}; expected hit rate {fraction:.1%} from the second epoch on"
    # The last of the samples are seen late: count the epochs until a cache of the whole split holds 99 % of it.
    epochs = math.log(1 - min(fraction, 0.99)) / math.log(1 - 1 / world)
    return f"{shown} per rank; expected hit rate {fraction:.1%} after about {math.ceil(epochs)} epochs"
