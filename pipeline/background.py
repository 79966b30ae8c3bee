"""Base class of the training and evaluation loaders: prepare batches in a background thread, ahead of the consumer."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.decode.cached import CachedPixels, CacheUse
from pipeline.decode.choose import make_cache, make_decoder, resolve_loader
from pipeline.decode.hardware import describe_jpeg_decoder, resolve_hw_decoder_load
from pipeline.decode.job import Normalization
from pipeline.feed_process.process import FeedProcess, FeedUnavailable
from pipeline.jobs import Jobs, JobStream, PreparedBatch, open_reader
from pipeline.loaders.node_cache import open_node_cache
from pipeline.loaders.process import resolve_device
from pipeline.options import LoaderOptions
from pipeline.prefetch import Prefetcher
from pipeline.stage_trace import StageTrace
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.memory_cache.layout import CacheLayout
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from pipeline.storage.placement import stored_pixels
from pipeline.storage.quick_check import quick_check
from pipeline.storage.reader import Encoded, SampleReader
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.memory import GIB

if TYPE_CHECKING:  # not at run time: the module imports DALI
    from pipeline.decode.decoded_cache import DecodedCache

log = logging.getLogger(__name__)

NO_FEED_PROCESS = "%s; batches are read and prepared in threads of the training process instead"


class BackgroundLoader(ABC):
    """Iterator over batches that a background thread prepares, on a separate CUDA stream if the device is a GPU.

    Subclasses implement `_batches`.

    Args:
        caches: whether to use the memory cache, if the options ask for it.
        memory_cache: use the cache of another loader of this process with the same set, seed and options, which stays
            open at least as long as this loader. None: open one.
    """

    def __init__(
        self,
        dataset: ShardSet,
        split: str,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        options: LoaderOptions,
        seed: int,
        rank: int,
        world: int,
        caches: bool = False,
        memory_cache: SharedPixels | None = None,
    ) -> None:
        device = resolve_device(device)
        self._loader = resolve_loader(options, dataset.split(split))
        options = resolve_hw_decoder_load(options, device) if self._loader == "dali" else options
        self._dataset, self._split, self._device, self._dtype, self._options = dataset, split, device, dtype, options
        self._settings = options.settings
        self._pixels = stored_pixels(dataset.split(split), beton=self._loader == "ffcv")
        self.rank, self.world = rank, world
        self.stage_trace = StageTrace()
        """Records the loader's stages and queues between its `start` and `stop`."""
        if options.settings.gpu_cache and (self._loader != "dali" or self._pixels != "none"):
            what = "stored pixels are not decoded" if self._pixels != "none" else "only --loader dali caches images"
            raise UserError(f"--gpu-cache {options.settings.gpu_cache:g}: {what}; omit this option")
        self._bad = BadSamples(budget=options.skip_budget, samples=dataset.split(split).samples, seed=seed)
        self._layout: CacheLayout | None = None
        if options.memory_cache and caches and self._loader != "synthetic":
            budget, short_side = int(options.memory_cache * GIB), options.memory_cache_short_side
            self._layout = CacheLayout.of(dataset.index(split), budget=budget, short_side=short_side, seed=seed)
        self._memory_cache: SharedPixels | None = None
        self._cache_of_other = memory_cache
        self._cache_use = CacheUse()
        self._gpu_cache: DecodedCache | None = None
        self._prefetcher: Prefetcher[Batch] | None = None
        self._source: FeedProcess | SampleReader | None = None
        self._closing = False
        if self._loader != "synthetic":
            with open_reader(dataset, split, options, beton=self._loader == "ffcv") as reader:
                skips = options.skip_budget > 0
                quick_check(dataset, split, reader, rank=rank, world=world, allow_one_bad_sample=skips)
        self._open_cache()

    @property
    def device(self) -> torch.device:
        """Device of the delivered tensors; a CUDA device has an index."""
        return self._device

    @property
    def num_classes(self) -> int:
        """Number of classes of the set."""
        return len(self._dataset.manifest.classes)

    @property
    def class_names(self) -> list[str]:
        """Folder name of each class of the set, in the order of the class numbers."""
        return [entry.folder for entry in self._dataset.manifest.classes]

    @property
    def bad_samples(self) -> int:
        """Number of distinct bad samples found so far, including those in batches that are not delivered yet."""
        return self._bad.count

    @property
    def memory_cache(self) -> SharedPixels | None:
        """The memory cache, which `close` closes; None if the options do not ask for one."""
        return self._memory_cache

    @property
    def cache_use(self) -> CacheUse | None:
        """How many samples this loader has prepared, how many of them its cache of decoded images had, and the bytes of
        this cache, in the memory of the node or of the GPU; None: there is no cache."""
        if self._gpu_cache is not None:
            return self._gpu_cache.use
        cache = self._memory_cache
        return None if cache is None else dataclasses.replace(self._cache_use, stored_bytes=cache.used()[1])

    @property
    def resolved(self) -> dict[str, str]:
        """The resolved loader options, as texts for the log."""
        settings, loader, cuda = self._settings, self._loader, self._device.type == "cuda"
        if loader == "synthetic":
            return {"loader": "synthetic"}
        where = f"the GPU, {describe_jpeg_decoder(settings)}" if cuda else "CPUs"
        whole = ", whole images" if settings.decode == "whole" else ""
        described = f"{loader} on {where}{whole}" if loader == "dali" else f"{loader} on CPUs"
        if loader == "dali" and self._pixels == "all":
            described = f"stored pixels, resized on {'the GPU' if cuda else 'CPUs'}"
        return {
            "loader": described,
            "threads": f"{settings.decode_threads} decode, {settings.read_threads} read",
            "feed": "separate process" if self._use_feed_process else "threads of the training process",
            "batches ahead": f"{settings.read_ahead} read, {settings.decode_ahead} in decoding, {settings.ready} ready",
            **self._describe_cache(),
        }

    def _describe_cache(self) -> dict[str, str]:
        side = self._options.memory_cache_short_side
        return {} if self._layout is None else {"memory cache": self._layout.describe(side)}

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            self._prefetcher = self._start()
        batch = next(self._prefetcher)
        if batch.ready is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(batch.ready)
            for tensor in (batch.images, batch.labels, batch.mask, batch.lam):
                if tensor is not None:
                    tensor.record_stream(consumer)
        return batch

    def stream(self) -> Iterator[Batch]:
        """Yield the batches from the loader's position to its end; a training continues across epochs."""
        while True:
            try:
                batch = next(self)
            except StopIteration:
                return
            yield batch

    def close(self) -> None:
        """Stop the background threads and release memory and file descriptors. Idempotent."""
        self._stop()
        if self._memory_cache is not None and self._cache_of_other is None:
            self._memory_cache.close()
        self._memory_cache = None

    def _stop(self) -> None:
        """Stop the background threads. The memory cache is kept."""
        if self._prefetcher is not None:
            self._closing = True
            if self._source is not None:
                self._source.interrupt()  # the thread may be waiting for a server that does not respond
            self._prefetcher.close()
            self._prefetcher = self._source = None
            _started.discard(self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """Yield the batches from the loader's current position. Runs in the background thread."""

    def _open_cache(self) -> None:
        """Open the memory cache, if it is used and not open. Collective (`open_node_cache`)."""
        if self._layout is not None and self._memory_cache is None:
            self._memory_cache = self._cache_of_other or open_node_cache(self._layout, world=self.world)

    def _start(self) -> Prefetcher[Batch]:
        self._open_cache()
        self._closing = False
        _started.add(self)
        threads, started = torch.get_num_threads(), threading.Event()
        name, depth = f"{self._split}-loader", self._settings.ready
        prefetcher = Prefetcher(self._stream(started), depth=depth, name=name, trace=self.stage_trace)
        # `_stream` calls torch.set_num_threads for its own thread, but that also changes the default of threads that
        # start later: restore it.
        started.wait()
        torch.set_num_threads(threads)
        return prefetcher

    def _stream(self, started: threading.Event) -> Iterator[Batch]:
        # One PyTorch thread: an OpenMP team that the decoder's threads preempt would mostly wait for its own members.
        # The first call of get_num_threads in a thread copies the global number, so it must precede set_num_threads.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.set()
        if self._device.type != "cuda":
            yield from self._batches()
            return
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            yield from self._batches()

    @contextlib.contextmanager
    def _prepare(self, jobs: Jobs) -> Iterator[Iterator[PreparedBatch]]:
        """Run `JobStream.run` (plan -> read -> replace bad samples -> draw), in the feed process if it is enabled.

        The process starts while the caller creates its decoder.
        """
        stream = JobStream(
            dataset=self._dataset,
            split=self._split,
            jobs=jobs,
            options=self._options,
            beton=self._loader == "ffcv",
            memory_cache=None if self._memory_cache is None else self._memory_cache.path,
        )
        process = self._start_process(stream)
        prepared = self._prepared(stream, process)
        try:
            yield prepared
        finally:
            prepared.close()
            if process is not None:
                process.close()

    def _decode(
        self,
        prepared: Iterator[PreparedBatch],
        *,
        rows: int,
        evaluation: bool = False,
        normalization: Normalization | None = None,
    ) -> Generator[tuple[torch.Tensor, PreparedBatch], None, None]:
        """Decode, crop, resize and flip images; yield [n, job.size, job.size, 3] on the device (see `Decoder`)."""
        settings, cache, pixels = self._settings, self._memory_cache, self._pixels
        self._gpu_cache = None if evaluation else make_cache(settings.gpu_cache, self._device)
        jobs = ((each.job, each) for each in prepared)
        if cache is not None:
            fill = CachedPixels(
                cache,
                threads=settings.decode_threads,
                ahead=settings.decode_ahead,
                fast_dct=self._loader == "ffcv",
                trace=self.stage_trace,
                use=self._cache_use,
            )
            jobs = fill.run(jobs)
            if pixels != "all":
                pixels = "all" if cache.layout.keeps_all else "some"
        decoder = make_decoder(
            self._loader,
            self._options,
            batch=rows,
            device=self._device,
            evaluation=evaluation,
            normalization=normalization,
            cache=self._gpu_cache,
            trace=self.stage_trace,
            pixels=pixels,
        )
        decoded = decoder.decode(jobs)
        try:
            for images, _, batch in decoded:
                yield images, batch
        finally:
            decoded.close()
            jobs.close()
            self._gpu_cache = None

    def _start_process(self, stream: JobStream) -> FeedProcess | None:
        if not self._use_feed_process:
            return None
        try:
            return FeedProcess(stream, self._bad, page_lock=self._page_lock, trace=self.stage_trace)
        except FeedUnavailable as error:
            log.warning(NO_FEED_PROCESS, error)
            return None

    def _prepared(self, stream: JobStream, process: FeedProcess | None) -> Generator[PreparedBatch, None, None]:
        if process is not None:
            self._set_source(process)
            try:
                process.wait_until_ready()
            except FeedUnavailable as error:
                log.warning(NO_FEED_PROCESS, error)
            else:
                yield from process.batches()
                return
        with stream.reader(BufferPool(pinned=self._page_lock), self.stage_trace) as reader:
            self._set_source(reader)
            yield from stream.run(reader, self._bad, self.stage_trace)

    def _set_source(self, source: FeedProcess | SampleReader) -> None:
        self._source = source
        if self._closing:  # `close`, in another thread, may have read `_source` before it was set
            source.interrupt()

    @property
    def _use_feed_process(self) -> bool:
        option = self._options.feed_process
        return option == "on" or (option == "auto" and self._device.type == "cuda")

    @property
    def _page_lock(self) -> bool:
        # The GPU decoder reads these bytes without a copy, and its JPEG engine requires pinned memory (DALI #5003).
        return self._loader == "dali" and self._device.type == "cuda"

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _channels_first(self, normalized: torch.Tensor) -> torch.Tensor:
        """Convert float32 [n, H, W, 3] to [n, 3, H, W] in the loader's dtype; a view if that is float32."""
        return normalized.permute(0, 3, 1, 2).to(self._dtype)

    def _labels(self, encoded: Encoded) -> torch.Tensor:
        return self._to_device(encoded.rows["label"].astype(np.int64))


_started: weakref.WeakSet[BackgroundLoader] = weakref.WeakSet()
"""Loaders whose background thread has been started and not closed."""


@atexit.register
def _close_started() -> None:
    """Close the loaders of a program that ends without closing them.

    Python stops threads at their next use of the interpreter, wherever they are. In PyTorch's C++ code this aborts the
    process: "terminate called without an active exception".
    """
    for loader in list(_started):
        loader.close()


os.register_at_fork(after_in_child=_started.clear)  # a forked process has no copies of the threads
