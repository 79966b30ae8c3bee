"""Measure how much Python's global interpreter lock (GIL) slows the loader down while the main thread runs the model.

The loader's threads wait for the GIL while the main thread launches kernels. Two loaders are compared: one prepares
batches in threads of the training process, the other in a feed process (`--feed-process`). The real `TrainLoader`, with
the paper's augmentation on photos of `pipeline sample photos`, delivers batches while a main thread holds the GIL for a
known fraction of the time, and while it causes the same CPU load without the GIL. The ratio of the two rates is the
cost of the GIL alone, because both load the cores equally. The slowdown of the main thread is measured in the same way.

Work of the loader per batch:

  feed    plan, reading, hashes, random draws, and the transfer to the loader's thread, which discards the images
  host    the Python work of a GPU run: plan, reading, hashes, draws, external_source, RandAugment's rounds, uploads,
          launches. No pixels: DALI reads only the JPEG headers, and a launch is LAUNCH seconds of bytecode. The rate of
          batches is therefore as high as in a GPU run.
  pixels  the complete loader on CPUs, including decoding and augmentation: a few batches per second

Main threads (the load without the GIL is a C loop of the same duration that releases it):

  replay  holds the GIL for 15 % of every millisecond, like a training step replayed from CUDA graphs
  eager   calls small PyTorch operators in sequence: each acquires and releases the GIL, like an eager step
  python  holds the GIL for 90 % of every millisecond in bytecode, more than any training step

Also measured: CPU milliseconds per batch of each part of the work, which hardly depend on the load of the machine. The
rates are meaningful only on an otherwise idle machine with at least 4 cores. Needs no GPU.

    python benchmarks/interpreter_lock.py [--rounds 5] [--seconds 3] [--batch 256] [--works feed host pixels]
                                          [--feeds threads process] [--data DIR] [--out FILE.json]
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from torch import Tensor

from benchmarks.interleaved import machine
from launch.cli import main as pipeline
from pipeline.augment.params import MixParams, SampleParams, draw, mix_params_of_steps
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.augment.transfer import upload
from pipeline.augment.triton_impl import passes
from pipeline.batch_shape import BatchShape
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.job import DecodeJob
from pipeline.feed_process.process import FeedProcess
from pipeline.jobs import MIX_STEPS, JobStream, TrainJobs
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.phases.train_phase import TrainPhase
from pipeline.plan import TrainPlan
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from shards.format.dataset import ShardSet

SIZE = 224
CPU = torch.device("cpu")
MANY_EPOCHS = 1_000_000
WARM_UP = 24  # number of batches until queues are full and every buffer has been used
LAUNCH = 30e-6  # seconds for a Triton launch from Python
PERIOD = 1e-3  # seconds; a main thread acquires the lock once per period
NEEDED = 15_000  # images/s that one GPU consumes
T = TypeVar("T")
Work = Literal["feed", "host", "pixels"]
Feed = Literal["threads", "process"]
TAKING = "taking a batch from the feed process"
# Parts that remain in the training process if there is a feed process.
LEFT = (TAKING, "external_source and DALI's run", "rounds, uploads, launches")


@dataclass(frozen=True)
class Options:
    """Measure how much the interpreter lock slows the loader down."""

    rounds: int = 5
    """Number of interleaved rounds."""
    seconds: float = 3.0
    """Seconds per measurement."""
    batch: int = 256
    """Images per batch; for the work `pixels`, a quarter of this number."""
    works: tuple[Work, ...] = ("feed", "host", "pixels")
    """Kinds of work of the loader to measure."""
    feeds: tuple[Feed, ...] = ("threads", "process")
    """Read and prepare batches in threads of this process, or in a feed process."""
    intervals: tuple[float, ...] = (5e-3, 5e-4)
    """Switch intervals (sys.setswitchinterval) in seconds; Python's default is 5e-3."""
    count: int = 3000
    """Number of photos to generate."""
    data: Path | None = None
    """Folder for photos/ and photos-shards/, generated if they do not exist. Default: a temporary folder."""
    out: Path | None = None
    """Write the results to this JSON file."""


class HostDecoder(DaliDecoder):
    """DALI with the inputs of a GPU run, but without decoding: it always returns the same images."""

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[Tensor, DecodeJob, T], None, None]:
        in_flight: deque[tuple[DecodeJob, T, tuple[Any, ...]]] = deque()

        def feed() -> Iterator[tuple[Any, ...]]:
            for job, extra in jobs:
                inputs = self._inputs(job)
                in_flight.append((job, extra, inputs))
                yield inputs

        source = feed()
        pipe = host_pipeline(source, self.batch, self.threads, self.ahead)
        images = torch.zeros(self.batch, SIZE, SIZE, 3, dtype=torch.uint8)
        with contextlib.closing(source):  # type: ignore[type-var]
            while True:
                pipe.run()
                job, extra, _ = in_flight.popleft()
                yield images, job, extra

    @property
    def _on_gpu(self) -> bool:
        return True


def host_pipeline(source: Iterator[tuple[Any, ...]], batch: int, threads: int, ahead: int) -> Pipeline:
    """Build a pipeline in which DALI's threads read the headers of the images and pass the other inputs through."""
    pipe = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=ahead, seed=0)
    with pipe:
        encoded, *rest = fn.external_source(source=source, num_outputs=5, batch=True, no_copy=True)
        pipe.set_outputs(fn.peek_image_shape(encoded), *rest)
    return pipe


class HostAugment:
    """The host's part of `BatchAugment` on a GPU, with busy-waiting instead of launches."""

    def __init__(
        self, recipe: AugmentRecipe, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self._size, self._images = recipe.size, torch.zeros(1, 3, 1, 1, dtype=dtype)

    def __call__(self, images: Tensor, params: SampleParams, mixing: MixParams | None) -> Tensor:
        host_augment(params, mixing, self._size)
        return self._images


def host_augment(params: SampleParams, mixing: MixParams | None, size: int) -> None:
    todo = passes.plan_passes(params, size, size, flip=False)
    upload([array for each in todo for array in each.arrays()], CPU)
    for _ in todo:
        hold(2 * LAUNCH)  # launches of the kernels "measure" and "apply"
    mixed: list[NDArray[Any]] = [] if mixing is None else [mixing.lam, mixing.use_cutmix.astype(np.uint8), mixing.box]
    upload([params.erase_boxes, params.erase_keys, *mixed], CPU)
    hold(LAUNCH)


class NoDecoder(HostDecoder):
    """Decoder that discards the encoded images and returns zeros."""

    def decode(self, jobs: Iterable[tuple[DecodeJob, T]]) -> Generator[tuple[Tensor, DecodeJob, T], None, None]:
        images = torch.zeros(self.batch, SIZE, SIZE, 3, dtype=torch.uint8)
        for job, extra in jobs:
            yield images, job, extra


class NoAugment(HostAugment):
    """Augmentation that returns constant images without any work."""

    def __call__(self, images: Tensor, params: SampleParams, mixing: MixParams | None) -> Tensor:
        return self._images


def no_decoder(loader: str, options: Any, *, batch: int, **_: Any) -> NoDecoder:
    return NoDecoder(batch=batch, device=CPU, threads=1)


def host_decoder(loader: str, options: Any, *, batch: int, **_: Any) -> HostDecoder:
    settings = options.settings
    return HostDecoder(batch=batch, device=CPU, threads=settings.decode_threads, ahead=settings.decode_ahead)


class Loader(TrainLoader):
    """The loader, with access to the number of batches that are ready."""

    @property
    def ready(self) -> int:
        return 0 if self._prefetcher is None else self._prefetcher.ready


@contextlib.contextmanager
def loader_of(dataset: ShardSet, work: Work, batch: int, feed: Feed = "threads") -> Iterator[Loader]:
    augment = augment_recipe("fat", size=SIZE)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=batch, seed=0, pairs=True)
    shape = BatchShape(global_batch=batch, pairs=True)
    options = LoaderOptions(feed_process="on" if feed == "process" else "off")
    with contextlib.ExitStack() as stack:
        if work != "pixels":
            decoder, augmentation = (no_decoder, NoAugment) if work == "feed" else (host_decoder, HostAugment)
            stack.enter_context(mock.patch("pipeline.background.make_decoder", decoder))
            stack.enter_context(mock.patch("pipeline.loader.BatchAugment", augmentation))
        loader = Loader(dataset, plan, shape, augment, epochs=MANY_EPOCHS, device=CPU, options=options)
        yield stack.enter_context(loader)


def hold(seconds: float) -> None:
    """Run bytecode for this time, holding the lock."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


_one = torch.zeros(4)


def eager() -> None:
    for _ in range(256):
        _one.add_(1)


_nothing = ctypes.create_string_buffer(1 << 20)
_copy = ctypes.CDLL(None).memset  # ctypes releases the lock around calls of a CDLL
_per_second = 0.0


def burn(seconds: float) -> None:
    """Keep a core busy in C for this time, without the lock."""
    global _per_second  # noqa: PLW0603 - cache of the calibration
    if not _per_second:
        start = time.thread_time()
        for _ in range(200):
            _copy(_nothing, 0, len(_nothing))
        _per_second = 200 * len(_nothing) / (time.thread_time() - start)
    size = len(_nothing)
    todo = int(seconds * _per_second)
    while todo > 0:
        _copy(_nothing, 0, min(size, todo))
        todo -= size


def part(fraction: float, busy: Callable[[float], None]) -> Callable[[], None]:
    """Return a function that runs `busy` for a fraction of a period and sleeps for the rest."""

    def once() -> None:
        busy(fraction * PERIOD)
        time.sleep((1 - fraction) * PERIOD)

    return once


# For each main thread: (its load with the lock, the same load without it).
MAIN: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "replay": (part(0.15, hold), part(0.15, burn)),
    "eager": (eager, part(1.0, burn)),
    "python": (part(0.9, hold), part(0.9, burn)),
}


def rates(loader: Loader | None, main: Callable[[], None] | None, seconds: float) -> tuple[float, float]:
    """Return (batches, iterations of the main thread) per second. Without `main`, only consume batches; without
    `loader`, only run the main thread."""
    batches = turns = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not (turns if loader is None else batches):
        if main is None:
            assert loader is not None
            next(loader)
            batches += 1
            continue
        main()
        turns += 1
        while loader is not None and loader.ready:
            next(loader)
            batches += 1
    elapsed = time.perf_counter() - start
    return batches / elapsed, turns / elapsed


def measure(dataset: ShardSet, work: Work, options: Options) -> dict[str, Any]:
    """Measure rates in interleaved rounds, and the fractions of their rates that loader and main thread keep.

    Returns:
        Medians by "feed, main thread", and the values of all rounds.
    """
    batch, seconds = options.batch // 4 if work == "pixels" else options.batch, options.seconds
    every: dict[str, dict[str, list[float]]] = {"batches_per_second": {}, "loader_keeps": {}, "main_keeps": {}}

    for number in range(options.rounds):
        own = {name: [rates(None, main, seconds / 2)[1] for main in pair] for name, pair in MAIN.items()}
        for feed in options.feeds:

            def note(what: str, name: str, value: float, feed: Feed = feed) -> None:
                every[what].setdefault(f"{feed}, {name}", []).append(value)

            with loader_of(dataset, work, batch, feed) as loader:
                for _ in range(WARM_UP):
                    next(loader)
                note("batches_per_second", "alone", rates(loader, None, seconds)[0])
                for name, (locked, free) in MAIN.items():
                    unlocked, turns = rates(loader, free, seconds)
                    note("batches_per_second", f"{name}, without the lock", unlocked)
                    free_keeps = turns / own[name][1]
                    for interval in options.intervals:
                        before = sys.getswitchinterval()
                        sys.setswitchinterval(interval)
                        try:
                            found, turns = rates(loader, locked, seconds)
                        finally:
                            sys.setswitchinterval(before)
                        key = f"{name}, switch interval {interval * 1e3:g} ms"
                        note("batches_per_second", key, found)
                        note("loader_keeps", key, found / unlocked)
                        note("main_keeps", key, turns / own[name][0] / free_keeps)
        print(f"{work}: round {number + 1} of {options.rounds}", flush=True)
    medians = {
        what: {name: statistics.median(values) for name, values in named.items()} for what, named in every.items()
    }
    return {"batch": batch, **medians, "rounds": every}


def parts(dataset: ShardSet, batch: int) -> dict[str, float]:
    """Return the CPU milliseconds per batch of the host's work by part: an upper bound on the time holding the lock.

    Only the calling thread is measured, not DALI's threads, which never hold the lock. With a feed process, the
    training process does the parts in `LEFT`; without one, all parts except `TAKING`.
    """
    recipe = augment_recipe("fat", size=SIZE)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=batch, seed=0, pairs=True)
    lanes = plan.lane_of(range(batch))
    shape = BatchShape(global_batch=batch, pairs=True)
    phases = (TrainPhase(first_step=0, augment=recipe, shape=shape),)
    tasks = TrainJobs(plan=plan, phases=phases, epochs=MANY_EPOCHS, start=plan.at(0))
    stream = JobStream(dataset=dataset, split="train", jobs=tasks, options=LoaderOptions())
    process = FeedProcess(stream, BadSamples(budget=0, samples=plan.samples, seed=0))
    with contextlib.closing(process), SampleReader(open_storage(dataset, "train")) as reader:
        process.wait_until_ready()
        handed = process.batches()
        encoded = reader.read(plan.ids(plan.at(0))).checked()
        sizes = {"heights": encoded.rows["height"], "widths": encoded.rows["width"]}
        params = draw(recipe, seed=0, epoch=0, ids=encoded.ids, **sizes)
        mixing = mix_params_of_steps(recipe, seed=0, steps=range(1), lanes=lanes)[0]
        job = DecodeJob(encoded=encoded, window=params.windows, size=SIZE, flip=params.flips)
        decoder = HostDecoder(batch=batch, device=CPU, threads=1)

        def jobs() -> Iterator[tuple[Any, ...]]:
            while True:
                yield decoder._inputs(job)

        pipe = host_pipeline(jobs(), batch, 1, 2)
        works: dict[str, tuple[Callable[[int], object], int]] = {
            "plan": (lambda step: plan.ids(plan.at(step)), 1),
            "reading and hashes (half of it copies, without the lock)": (lambda _: reader._start(encoded.ids), 1),
            "draws of samples": (
                lambda step: draw(recipe, seed=0, epoch=step, ids=encoded.ids, **sizes),
                1,
            ),
            "draws of mixing": (
                lambda step: mix_params_of_steps(
                    recipe, seed=0, steps=range(step * MIX_STEPS, (step + 1) * MIX_STEPS), lanes=lanes
                ),
                MIX_STEPS,
            ),
            TAKING: (lambda _: next(handed), 1),
            "external_source and DALI's run": (lambda _: pipe.run(), 1),
            "rounds, uploads, launches": (lambda _: host_augment(params, mixing, SIZE), 1),
        }
        return {name: _median_cpu(work) * 1e3 / batches for name, (work, batches) in works.items()}


def _median_cpu(work: Callable[[int], object], *, times: int = 31) -> float:
    """Return the median CPU seconds of this thread per call."""
    work(0)
    found = []
    for number in range(times):
        start = time.thread_time()
        work(number)
        found.append(time.thread_time() - start)
    return statistics.median(found)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        if not (folder / "photos-shards").exists():
            assert pipeline(["sample", "photos", str(folder / "photos"), "--count", str(options.count)]) == 0
            assert pipeline(["shard", str(folder / "photos"), "--out", str(folder / "photos-shards")]) == 0
        dataset = ShardSet(folder / "photos-shards")
        result: dict[str, Any] = {
            "machine": machine(CPU),
            "settings": {"rounds": options.rounds, "seconds": options.seconds, "launch_seconds": LAUNCH},
            "cpu_ms_per_batch": {"batch": options.batch, **parts(dataset, options.batch)},
            **{work: measure(dataset, work, options) for work in options.works},
        }
    own = result["cpu_ms_per_batch"]
    for name, value in own.items():
        print(f"{name:70s} {value:8.2f}{'' if name == 'batch' else ' ms'}")
    needed = NEEDED / options.batch
    for feed, names in (("threads", own.keys() - {"batch", TAKING}), ("process", LEFT)):
        total = sum(own[name] for name in names)
        load = total * needed / 1e3
        print(f"{feed}: {total:.2f} ms in the training process, {load:.0%} of one core at {NEEDED:,} images/s")
    for work in options.works:
        found = result[work]
        alone = ", ".join(f"{feed} {found['batches_per_second'][f'{feed}, alone']:.1f}" for feed in options.feeds)
        print(f"{work}: batches (of {found['batch']} images) per second without a main thread: {alone}")
        for name, value in found["loader_keeps"].items():
            speed = found["batches_per_second"][name]
            main = found["main_keeps"][name]
            print(f"  {name:44s} {speed:8.1f} /s; loader at {value:.0%} of its rate, main thread at {main:.0%}")
    average, cores = result["machine"]["load"], result["machine"]["cores"]
    print(f"load average {average:.1f} on {cores} cores; the rates are meaningful only on an otherwise idle machine")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
