"""Decode, crop, resize and flip by DALI: on the GPU (`mixed`) where there is one, on the CPU otherwise.

DALI draws nothing itself: windows, sizes and flips are handed in through `external_source`, so what it decodes is what
the plan and the augmentation parameters say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from pipeline.reader import Encoded
from shards.errors import UserError

T = TypeVar("T")


class DecodeError(UserError):
    """DALI could not decode a batch."""


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """How DALI works; none of it changes what comes out."""

    threads: int | None = None
    """Decoding threads of this rank. None = its share of the machine's cores."""
    prefetch: int = 2
    """Batches that DALI works on at once."""
    hw_decoder_load: float = 0.9
    """Share of the images given to the GPU's JPEG engine, where it has one; the rest goes to its CUDA decoder."""
    preallocate_width: int = 0
    """Decoder buffers are allocated for images of this width beforehand (0 = as they come); saves stalls at first."""
    preallocate_height: int = 0


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


@dataclass
class DaliDecoder:
    """Turns a stream of jobs into a stream of uint8 batches.

    Args:
        size: side of the output in pixels.
        batch: rows of the largest batch.
        device: where the images shall be; a CUDA device makes DALI decode there.
        evaluation: jobs carry `resize` and `anchor`.
    """

    size: int
    batch: int
    device: torch.device
    threads: int
    evaluation: bool = False
    options: DaliOptions = field(default_factory=DaliOptions)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Iterator[tuple[torch.Tensor, DecodeJob, T]]:
        """Decode jobs in order.

        Yields:
            images: uint8 [n, size, size, 3] on the device, RGB; valid until the next one is asked for.
            job, extra: as they came.

        Raises:
            DecodeError: DALI failed on a batch. What it had already prefetched is lost, so the stream ends there.
        """
        in_flight: deque[tuple[DecodeJob, T]] = deque()

        def feed() -> Generator[tuple[Any, ...], None, None]:
            for job, extra in jobs:
                in_flight.append((job, extra))
                yield self._inputs(job)

        source = feed()
        pipeline = self._build(source)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            while True:
                try:
                    (images,) = pipeline.run(stream)
                except StopIteration:
                    return
                except UserError:
                    raise  # from the reader, through feed()
                except RuntimeError as error:
                    raise self._explain(error, in_flight) from error
                job, extra = in_flight.popleft()
                yield torch.from_dlpack(images.as_tensor()), job, extra
        finally:
            source.close()
            del pipeline

    def _inputs(self, job: DecodeJob) -> tuple[Any, ...]:
        n = len(job.encoded.ids)
        inputs: tuple[Any, ...] = (job.encoded.jpegs, *map(np.ascontiguousarray, np.split(job.window, 2, axis=1)))
        if self.evaluation:
            assert job.resize is not None
            assert job.anchor is not None
            return (*inputs, job.resize.astype(np.float32), job.anchor)
        flip = np.zeros(n, np.bool_) if job.flip is None else job.flip
        return (*inputs, flip.astype(np.int32).reshape(n, 1))

    def _build(self, source: Iterator[tuple[Any, ...]]) -> Pipeline:
        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self.options.prefetch,
            seed=0,
        )
        with pipeline:
            inputs = fn.external_source(source=source, num_outputs=5 if self.evaluation else 4, batch=True)
            encoded, start, shape, *rest = inputs
            decoder_options: dict[str, Any] = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
            if on_gpu:
                decoder_options |= {
                    "hw_decoder_load": self.options.hw_decoder_load,
                    "preallocate_width_hint": self.options.preallocate_width,
                    "preallocate_height_hint": self.options.preallocate_height,
                }
            # The recipe ignores EXIF orientation, and so do the index's heights and widths.
            images = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axis_names="HW", adjust_orientation=False, **decoder_options
            )
            resize = {"interp_type": types.INTERP_CUBIC, "antialias": True}
            if self.evaluation:
                images = fn.resize(images, size=rest[0], **resize)
                images = fn.slice(images, start=rest[1], shape=[self.size, self.size], axis_names="HW")
            else:
                images = fn.resize(images, size=[self.size, self.size], **resize)
                images = fn.flip(images, horizontal=rest[0])
            pipeline.set_outputs(images)
        return pipeline

    @staticmethod
    def _explain(error: RuntimeError, in_flight: deque[tuple[DecodeJob, T]]) -> DecodeError:
        """DALI names no sample: say which batch it was, and where to look."""
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        ids: Iterable[int] = in_flight[0][0].encoded.ids.tolist() if in_flight else ()
        return DecodeError(
            f"a batch could not be decoded ({detail}); its samples are {_few(ids)}; run 'pipeline verify' on the set"
        )


def _few(ids: Iterable[int], limit: int = 8) -> str:
    shown = [str(int(i)) for i in ids]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")
