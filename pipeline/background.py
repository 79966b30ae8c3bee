"""What training's and evaluation's loaders share: read, decode and finish batches in a thread, ahead of its user."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.bad_samples import BadSamples
from pipeline.batch import Batch
from pipeline.decode import DecodeJob, Normalisation
from pipeline.decode_hardware import decoders_in_words, with_decoder
from pipeline.decoders import chosen_loader, make_decoder
from pipeline.options import LoaderOptions
from pipeline.plan import Ids, Need, Position
from pipeline.prefetch import Prefetcher
from pipeline.quick_check import quick_check
from pipeline.reader import Encoded, SampleReader
from pipeline.storage import storage_of
from shards.dataset import ShardSet

T = TypeVar("T")


@dataclass(frozen=True)
class Portion:
    """What a rank delivers at once."""

    ids: Ids
    """int64 [n], as the plan says."""
    position: Position
    micro: int = 0


class BackgroundLoader(ABC):
    """A stream of batches made in a thread of its own, on a CUDA stream of its own."""

    def __init__(
        self,
        dataset: ShardSet,
        split: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        options: LoaderOptions,
        seed: int,
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # torch.cuda.set_device wants a number
        self._loader = chosen_loader(options, dataset.split(split))
        options = with_decoder(options, device) if self._loader == "dali" else options
        self._dataset, self._split, self._device, self._dtype, self._options = dataset, split, device, dtype, options
        self._settings = options.settings
        self._bad = BadSamples(budget=options.skip_budget, samples=dataset.split(split).samples, seed=seed)
        self._prefetcher: Prefetcher[Batch] | None = None
        self._reading: SampleReader | None = None
        if self._loader != "synthetic":
            with self._reader() as reader:
                quick_check(dataset, split, reader, one_fault_is_fine=options.skip_budget > 0)

    @property
    def bad_samples(self) -> int:
        """Different bad samples that were met so far, also in batches that still wait to be delivered."""
        return self._bad.count

    @property
    def picks(self) -> dict[str, str]:
        """What the loader works with, for people and the log."""
        settings, loader, cuda = self._settings, self._loader, self._device.type == "cuda"
        if loader == "synthetic":
            return {"loader": "synthetic"}
        where = f"the GPU, {decoders_in_words(settings.hw_decoder_load)}" if cuda else "CPUs"
        return {
            "loader": f"{loader} on {where if loader == 'dali' else 'CPUs'}",
            "threads": f"{settings.decode_threads} decode, {settings.read_threads} read",
            "batches ahead": f"{settings.read_ahead} read, {settings.decode_ahead} in decoding, {settings.ready} ready",
        }

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

    def close(self) -> None:
        """Stop the threads and give back memory and file descriptors. Idempotent."""
        if self._prefetcher is not None:
            if self._reading is not None:
                self._reading.interrupt()  # else the thread might wait for a server that does not answer
            self._prefetcher.close()
            self._prefetcher = self._reading = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """The batches from where the loader stands; runs in the loader's thread."""

    @abstractmethod
    def _needs(self) -> Iterator[Need]:
        """The shards that these batches come from."""

    @abstractmethod
    def _step(self, position: Position) -> int:
        """The step of a position, counted as `_needs` does."""

    def _start(self) -> Prefetcher[Batch]:
        threads, begun = torch.get_num_threads(), threading.Event()
        prefetcher = Prefetcher(self._stream(begun), depth=self._settings.ready, name=f"{self._split}-loader")
        # The loader's thread has set its own number of threads, but with it the one that threads to come begin with.
        begun.wait()
        torch.set_num_threads(threads)
        return prefetcher

    def _stream(self, begun: threading.Event) -> Iterator[Batch]:
        # A team of threads that the decoder's threads keep interrupting spends its time waiting for one another.
        torch.get_num_threads()  # a thread takes over the common number when it first asks; later it would undo ours
        torch.set_num_threads(1)
        begun.set()
        if self._device.type != "cuda":
            yield from self._batches()
            return
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            yield from self._batches()

    def _decoded(
        self,
        work: Iterable[Portion],
        job: Callable[[Encoded, Portion], tuple[DecodeJob, T]],
        *,
        size: int,
        rows: int,
        evaluation: bool = False,
        normalisation: Normalisation | None = None,
    ) -> Iterator[tuple[torch.Tensor, DecodeJob, tuple[Portion, T]]]:
        """Read and decode: images [n, size, size, 3] on the device (see `Decoder`), the job, and what it came of."""
        decoder = make_decoder(
            self._loader,
            self._options,
            size=size,
            batch=rows,
            device=self._device,
            evaluation=evaluation,
            normalisation=normalisation,
        )
        with self._reader() as reader:
            self._reading = reader
            reader.expect(self._needs())

            def jobs() -> Iterator[tuple[DecodeJob, tuple[Portion, T]]]:
                ordered = ((portion.ids, portion) for portion in work)
                for encoded, portion in reader.read_ahead(ordered, self._settings.read_ahead):
                    reader.reached(self._step(portion.position))
                    mended = self._bad.mend(encoded, reader, epoch=portion.position.epoch)
                    made, extra = job(mended, portion)
                    yield made, (portion, extra)

            yield from decoder.decode(jobs())

    def _reader(self) -> SampleReader:
        storage = storage_of(self._dataset, self._split, beton=self._loader == "ffcv")
        # The GPU's decoder is handed these bytes without a copy, and its JPEG engine wants them pinned (DALI #5003).
        pinned = self._loader == "dali" and self._device.type == "cuda"
        options, threads = self._options, self._settings.read_threads
        return SampleReader(storage, threads=threads, check=options.check_hashes, pinned=pinned)

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _channels_first(self, normalised: torch.Tensor) -> torch.Tensor:
        """float32 [n, H, W, 3] -> [n, 3, H, W] in the loader's dtype; the same memory if it is float32."""
        return normalised.permute(0, 3, 1, 2).to(self._dtype)

    def _labels(self, encoded: Encoded) -> torch.Tensor:
        return self._to_device(encoded.rows["label"].astype(np.int64))

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
