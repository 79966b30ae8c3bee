"""The DALI decoder: decode, crop, resize and flip on a GPU (`mixed`), or decode and crop on the CPU.

DALI draws no random numbers. Crop windows, sizes and flips are passed through `external_source`, so the result follows
the plan and the augmentation parameters. On a CPU, DALI's bicubic resize would take most of the time; PyTorch's takes a
tenth of that and is closer to PIL's (`pipeline.decode.resize`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from pipeline.decode.job import DecodeError, DecodeJob, Normalisation
from pipeline.decode.resize import Resizer
from pipeline.options import LoaderSettings
from pipeline.stage_trace import WAIT_FOR_GPU, StageTrace
from shards.errors import UserError, first_line

T = TypeVar("T")

# Maximum number of delivered batches kept alive until the consumer's stream has read them; beyond it, `keep` waits.
MAX_KEPT = 4


@dataclass
class DaliDecoder:
    """A decoder that uses DALI (see `pipeline.decode.job.Decoder`).

    Args:
        batch: rows of the largest batch.
        device: device of the output. With a CUDA device, DALI decodes on that GPU.
        threads: CPU threads that decode, or that prepare decoding on the GPU.
        ahead: number of batches that are decoded concurrently.
        evaluation: whether the jobs have regions (`DecodeJob.region`).
        normalisation: normalisation to apply, which makes the output float32. None: uint8.
        settings: only the options of the GPU decoder are used.
        trace: records the waits for DALI, the resizing on a CPU and the number of batches inside DALI.
    """

    batch: int
    device: torch.device
    threads: int
    ahead: int = 2
    evaluation: bool = False
    normalisation: Normalisation | None = None
    settings: LoaderSettings = field(default_factory=LoaderSettings)
    trace: StageTrace = field(default_factory=StageTrace)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs in order.

        Raises:
            DecodeError: DALI failed on a batch. Its prefetched batches are lost, so the stream ends.
        """
        in_flight: deque[tuple[DecodeJob, T, tuple[Any, ...]]] = deque()

        def feed() -> Generator[tuple[Any, ...], None, None]:
            for job, extra in jobs:
                inputs = self._inputs(job)
                in_flight.append((job, extra, inputs))
                self.trace.level("decoding", len(in_flight))
                yield inputs

        source = feed()
        pipeline = self._build(source)
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        in_use = None if stream is None else InUseBuffers(stream)
        with Resizer(threads=self.threads, normalisation=self.normalisation) as resize:
            try:
                for number in itertools.count():
                    try:
                        with self.trace.span("decode", number):
                            (images,) = pipeline.run(stream)
                    except StopIteration:
                        return
                    except UserError:
                        raise  # an error of the reader, raised inside `feed`
                    except RuntimeError as error:
                        raise self._explain(error, in_flight) from error
                    job, extra, inputs = in_flight.popleft()
                    self.trace.level("decoding", len(in_flight))
                    if in_use is not None:
                        pixels = torch.from_dlpack(images.as_tensor())
                        yield pixels, job, extra
                        with self.trace.span(WAIT_FOR_GPU, number):
                            in_use.keep(pixels, inputs)
                        del pixels, inputs
                    else:  # `resize` copies, because the next `run` overwrites DALI's images
                        yield self.trace.call("resize", number, resize, list(map(np.asarray, images)), job), job, extra
            finally:
                source.close()
                if in_use is not None:
                    in_use.close()
                del pipeline

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _inputs(self, job: DecodeJob) -> tuple[Any, ...]:
        n = len(job.encoded.ids)
        inputs: tuple[Any, ...] = (job.encoded.images, *map(np.ascontiguousarray, np.split(job.window, 2, axis=1)))
        if not self._on_gpu:
            return inputs
        inputs = (*inputs, np.full((n, 2), job.size, np.float32))
        if self.evaluation:
            assert job.region is not None
            start, extent = np.split(job.region, 2, axis=1)
            return (*inputs, start.astype(np.float32), (start + extent).astype(np.float32))
        flip = np.zeros(n, np.bool_) if job.flip is None else job.flip
        return (*inputs, flip.astype(np.int32).reshape(n, 1))

    def _empty_pipeline(self) -> Pipeline:
        return Pipeline(
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if self._on_gpu else None,
            prefetch_queue_depth=self.ahead,
            seed=0,
        )

    def _build(self, source: Iterator[tuple[Any, ...]]) -> Pipeline:
        pipeline = self._empty_pipeline()
        with pipeline:
            count = 3 if not self._on_gpu else 6 if self.evaluation else 5
            # Without no_copy, this thread would copy while holding the interpreter lock (2.5 of 3.8 ms for 256 photos).
            # `decode` keeps the arrays alive until DALI has decoded them.
            encoded, start, shape, *rest = fn.external_source(
                source=source, num_outputs=count, batch=True, no_copy=True
            )
            decoder_options: dict[str, Any] = {"device": "cpu"}
            if self._on_gpu:
                decoder_options = {
                    "device": "mixed",
                    "hw_decoder_load": self.settings.hw_decoder_load,
                    "preallocate_width_hint": self.settings.preallocate_width,
                    "preallocate_height_hint": self.settings.preallocate_height,
                }
            # The heights and widths in the index ignore the EXIF orientation, as does the reference recipe.
            images = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                adjust_orientation=False,
                output_type=types.RGB,
                **decoder_options,
            )
            pipeline.set_outputs(self._resized(images, *rest) if self._on_gpu else images)
        return pipeline

    def _resized(self, images: Any, size: Any, *rest: Any) -> Any:
        # The size is an input of the graph, because it may change from batch to batch.
        cubic = {"size": size, "interp_type": types.INTERP_CUBIC, "antialias": True}
        if self.evaluation:
            # DALI's filter also reads pixels outside the region of interest, as `DecodeJob.region` requires.
            region = {"roi_start": rest[0], "roi_end": rest[1], "roi_relative": False}
            images = fn.resize(images, **region, **cubic)
            mirror = {}
        else:
            images = fn.resize(images, **cubic)
            mirror = {"mirror": rest[0]}
        if self.normalisation is None:
            return fn.flip(images, horizontal=mirror["mirror"]) if mirror else images
        scale = [[255 * value for value in values] for values in (self.normalisation.mean, self.normalisation.std)]
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="HWC", mean=scale[0], std=scale[1], **mirror
        )

    @staticmethod
    def _explain(error: RuntimeError, in_flight: deque[tuple[DecodeJob, T, tuple[Any, ...]]]) -> DecodeError:
        """Name the samples of the batch, because DALI's error does not name the damaged sample."""
        detail = first_line(error) or "DALI gave no reason"
        return DecodeError.of(in_flight[0][0].encoded.ids if in_flight else (), detail)


class InUseBuffers:
    """Keeps delivered batches, and the arrays that they are decoded from, alive until the consumer has read them.

    DALI reuses the memory of a batch in the order of its own streams. Once a batch is no longer referenced, the next
    batch may overwrite it although the consumer's stream has not read it yet. Holding the batch until that stream has
    passed an event prevents this. By then DALI has also read the input arrays, which were passed without a copy.

    Args:
        stream: the consumer's stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._kept: deque[tuple[tuple[torch.Tensor, object], torch.cuda.Event]] = deque()

    def keep(self, images: torch.Tensor, inputs: object = None) -> None:
        """Hold a batch and its inputs until the stream has done all work queued so far.

        Waits for the oldest batch if more than `MAX_KEPT` are held.
        """
        self._kept.append(((images, inputs), self._stream.record_event()))
        while self._kept and (len(self._kept) > MAX_KEPT or self._kept[0][1].query()):
            self._kept[0][1].synchronize()
            self._kept.popleft()

    def close(self) -> None:
        """Wait until the stream has read every batch, including the last, and release them."""
        self._stream.record_event().synchronize()
        self._kept.clear()
