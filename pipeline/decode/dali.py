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
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode.dali_graph import DaliGraph
from pipeline.decode.decoded_cache import DecodedCache
from pipeline.decode.hardware import rows_decoded_on_cpu
from pipeline.decode.job import DecodeError, DecodeJob, Normalization
from pipeline.decode.pixels import take_rows
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
        normalization: normalization to apply, which makes the output float32. None: uint8.
        settings: options of DALI.
        cache: cache of whole decoded images; requires the decode path `whole`.
        rows_vary: whether batches may have fewer than `batch` rows, in any order.
        trace: records the waits for DALI, the resizing on a CPU and the number of batches inside DALI.
    """

    batch: int
    device: torch.device
    threads: int
    ahead: int = 2
    evaluation: bool = False
    normalization: Normalization | None = None
    settings: LoaderSettings = field(default_factory=LoaderSettings)
    cache: DecodedCache | None = None
    rows_vary: bool = False
    trace: StageTrace = field(default_factory=StageTrace)

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[torch.Tensor, DecodeJob, T], None, None]:
        """Decode jobs in order.

        Raises:
            DecodeError: DALI failed on a batch. Its prefetched batches are lost, so the stream ends.
        """
        in_flight: deque[_Batch[T]] = deque()
        batches = self._batches(jobs, in_flight)
        pipeline = self._build(batches)
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        in_use = None if stream is None else InUseBuffers(stream)
        with Resizer(threads=self.threads, normalization=self.normalization) as resize:
            try:
                for number in itertools.count():
                    try:
                        with self.trace.span("decode", number):
                            images, *whole = pipeline.run(stream)
                    except StopIteration:
                        return
                    except UserError:
                        raise  # an error of the reader, raised inside `_batches`
                    except RuntimeError as error:
                        raise self._explain(error, in_flight) from error
                    batch = in_flight.popleft()
                    self.trace.level("decoding", len(in_flight))
                    if in_use is not None:
                        pixels = torch.from_dlpack(images.as_tensor())
                        self._store(batch, *whole)
                        if not batch.warms_up:
                            yield pixels, batch.job, batch.extra
                        with self.trace.span(WAIT_FOR_GPU, number):
                            in_use.keep(pixels, (batch, whole))
                        del pixels, batch
                    else:  # `resize` copies, because the next `run` overwrites DALI's images
                        decoded = list(map(np.asarray, images))
                        self._store(batch, decoded)
                        windows = self._windows(decoded, batch.job)
                        yield self.trace.call("resize", number, resize, windows, batch.job), batch.job, batch.extra
            finally:
                batches.close()
                if in_use is not None:
                    in_use.close()
                del pipeline

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _graph(self) -> DaliGraph:
        return DaliGraph(
            on_gpu=self._on_gpu,
            evaluation=self.evaluation,
            normalization=self.normalization,
            shares_cpu=self._on_gpu and self.settings.cpu_decode > 0,
            cached=self.cache is not None,
            settings=self.settings,
        )

    def _build(self, batches: Iterator[_Batch[T]]) -> Any:
        sizes: dict[str, Any] = {"batch": self.batch, "threads": self.threads, "ahead": self.ahead}
        if self.cache is None:
            return self._graph.build((each.inputs for each in batches), device=self.device, **sizes)
        first, second = itertools.tee(batches)  # DALI calls the two sources in any order
        cached = (each.cached for each in second)
        return self._graph.build((each.inputs for each in first), cached, device=self.device, **sizes)

    def _batches(
        self, jobs: Iterable[tuple[DecodeJob, T]], in_flight: deque[_Batch[T]]
    ) -> Generator[_Batch[T], None, None]:
        """Yield the batches for DALI, and append each to `in_flight`."""
        graph = self._graph
        warms_up = graph.on_gpu and (graph.shares_cpu or graph.cached or self.rows_vary)
        for job, extra in jobs:
            if warms_up:
                # nvImageCodec fixes the number of images that the JPEG engine may get in its first batch
                # (`pipeline.decode.hardware`), so that batch must be complete, and the GPU must decode all its rows.
                complete = take_rows(job, np.resize(np.arange(len(job.window)), self.batch))
                in_flight.append(self._batch(complete, extra, warms_up=True))
                yield in_flight[-1]
                warms_up = False
            in_flight.append(self._batch(job, extra))
            self.trace.level("decoding", len(in_flight))
            yield in_flight[-1]

    def _batch(self, job: DecodeJob, extra: T, *, warms_up: bool = False) -> _Batch[T]:
        """Choose the source of each row: the cache, the CPU's or the GPU's decoder."""
        ids, cache = job.encoded.ids, self.cache
        by_cpu, hit = rows_decoded_on_cpu(ids, 0.0 if warms_up else self.settings.cpu_decode), None
        cached, reserved = list[Any](), list[int]()
        if cache is not None and warms_up:
            hit, cached = np.zeros_like(by_cpu), [cache.nothing] * len(ids)
        elif cache is not None:
            hit, cached = cache.take(ids)
            reserved = cache.reserve(ids, job.encoded.rows["height"], job.encoded.rows["width"])
        return _Batch(job, extra, self._inputs(job, by_cpu, hit), cached, reserved, warms_up)

    def _inputs(
        self, job: DecodeJob, by_cpu: NDArray[np.bool_] | None = None, hit: NDArray[np.bool_] | None = None
    ) -> tuple[Any, ...]:
        """Return the inputs of the graph (`DaliGraph`).

        Args:
            by_cpu: bool [n], which rows the CPU decodes for a GPU.
            hit: bool [n], which rows the cache delivers.
        """
        n, graph = len(job.encoded.ids), self._graph
        inputs: tuple[Any, ...] = (job.encoded.images,)
        if graph.crops:
            inputs = (*inputs, *map(np.ascontiguousarray, np.split(job.window, 2, axis=1)))
        if graph.on_gpu:
            inputs = (*inputs, np.full((n, 2), job.size, np.float32))
            if self.evaluation:
                assert job.region is not None
                start, extent = np.split(job.region, 2, axis=1)
                inputs = (*inputs, start.astype(np.float32), (start + extent).astype(np.float32))
            else:
                flip = np.zeros(n, np.bool_) if job.flip is None else job.flip
                inputs = (*inputs, flip.astype(np.int32).reshape(n, 1))
        return (*inputs, *([by_cpu] if graph.shares_cpu else []), *([hit] if graph.cached else []))

    def _store(self, batch: _Batch[T], images: Any = ()) -> None:
        """Store the whole images of the rows for which the cache has reserved memory."""
        for row in batch.reserved:
            assert self.cache is not None
            self.cache.store(int(batch.job.encoded.ids[row]), torch.from_dlpack(images[row]))

    def _windows(self, images: list[NDArray[np.uint8]], job: DecodeJob) -> list[NDArray[np.uint8]]:
        """Return the crop windows of the decoded images, on a CPU."""
        if not self._graph.whole:
            return images
        corners = zip(images, job.window.tolist(), strict=True)
        return [image[y : y + height, x : x + width] for image, (y, x, height, width) in corners]

    @staticmethod
    def _explain(error: RuntimeError, in_flight: deque[_Batch[T]]) -> DecodeError:
        """Name the samples of the batch, because DALI's error does not name the damaged sample."""
        detail = first_line(error) or "DALI gave no reason"
        return DecodeError.of(in_flight[0].job.encoded.ids if in_flight else (), detail)


@dataclass(frozen=True)
class _Batch(Generic[T]):
    """A batch that DALI decodes."""

    job: DecodeJob
    extra: T
    inputs: tuple[Any, ...]
    """Inputs of the graph, which must live until DALI has read them."""
    cached: list[Any] = field(default_factory=list)
    """Images from the cache, one per row; empty without a cache."""
    reserved: list[int] = field(default_factory=list)
    """Rows whose images are stored in the cache after decoding."""
    warms_up: bool = False
    """Whether the batch only prepares the decoder and is not delivered."""


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
