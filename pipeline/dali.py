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
from nvidia.dali import Pipeline, fn, types

from pipeline.decode import DecodeError, DecodeJob, Normalisation
from pipeline.options import DaliOptions
from shards.errors import UserError

T = TypeVar("T")


@dataclass
class DaliDecoder:
    """Turns a stream of jobs into a stream of batches (see `pipeline.decode.Decoder`).

    Args:
        size: side of the output in pixels.
        batch: rows of the largest batch.
        device: where the images shall be; a CUDA device makes DALI decode there.
        threads: that decode, or prepare decoding.
        ahead: batches in the works at once.
        evaluation: jobs carry `resize` and `anchor`.
        normalisation: to be done too, giving float32; None = uint8.
    """

    size: int
    batch: int
    device: torch.device
    threads: int
    ahead: int = 2
    evaluation: bool = False
    normalisation: Normalisation | None = None
    options: DaliOptions = field(default_factory=DaliOptions)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Iterator[tuple[torch.Tensor, DecodeJob, T]]:
        """Decode jobs in order.

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
        inputs: tuple[Any, ...] = (job.encoded.images, *map(np.ascontiguousarray, np.split(job.window, 2, axis=1)))
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
            prefetch_queue_depth=self.ahead,
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
            pipeline.set_outputs(self._finish(images, flip=None if self.evaluation else rest[0]))
        return pipeline

    def _finish(self, images: Any, flip: Any) -> Any:
        if self.normalisation is None:
            return images if flip is None else fn.flip(images, horizontal=flip)
        scale = [[255 * value for value in values] for values in (self.normalisation.mean, self.normalisation.std)]
        mirror = {} if flip is None else {"mirror": flip}
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="HWC", mean=scale[0], std=scale[1], **mirror
        )

    @staticmethod
    def _explain(error: RuntimeError, in_flight: deque[tuple[DecodeJob, T]]) -> DecodeError:
        """DALI names no sample: say which batch it was."""
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return DecodeError.of(in_flight[0][0].encoded.ids if in_flight else (), detail)
