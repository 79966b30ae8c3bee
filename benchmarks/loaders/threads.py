"""Loaders with other workers than PyTorch's: threads of SPDL, processes of Grain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loaders.work import (
    BATCH,
    MANY_EPOCHS,
    RECIPE,
    SIZE,
    WORKERS,
    NotInstalled,
    Photos,
    library,
    load,
    transform,
)


def spdl_ffmpeg(photos: Photos) -> Iterator[int]:
    """Use SPDL's own functions: FFmpeg decodes, crops, resizes and flips without the interpreter lock."""
    io, transforms = library("spdl.io"), library("torchvision.transforms.v2")
    load_ffmpeg(io, photos)
    crop = transforms.RandomResizedCrop(SIZE, RECIPE.scale, RECIPE.ratio)

    def decode(path: Path) -> Any:
        packets = io.demux_image(str(path))
        # The crop window is drawn for a tensor that needs no memory.
        window = crop.make_params([torch.empty(3, packets.height, packets.width, device="meta")])
        place = "crop={width}:{height}:{left}:{top}".format_map(window)
        flip = "hflip," if random.random() < 0.5 else ""
        filters = f"{place},scale={SIZE}:{SIZE}:flags=bicubic,{flip}format=pix_fmts=rgb24"
        return io.decode_packets(packets, filter_desc=filters)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (RECIPE.mean, RECIPE.std))

    def convert(frames: list[Any]) -> Tensor:
        images: Tensor = io.to_torch(io.convert_frames(frames)).permute(0, 3, 1, 2)
        return images.float().div_(255).sub_(mean).div_(std)

    yield from spdl(photos, decode, convert)


def load_ffmpeg(io: Any, photos: Photos) -> None:
    """Raise NotInstalled if FFmpeg's libraries, which SPDL loads when it first needs them, are missing."""
    try:
        io.demux_image(str(photos.paths[0]))
    except RuntimeError as error:
        raise NotInstalled("FFmpeg's shared libraries (apt: ffmpeg)") from error


def spdl_torchvision(photos: Photos) -> Iterator[int]:
    """Use the functions of the DataLoader rows, in SPDL's threads."""
    transform()
    yield from spdl(photos, lambda path: load(path.read_bytes()), torch.stack)


def spdl(photos: Photos, decode: Callable[[Path], Any], convert: Callable[[list[Any]], Tensor]) -> Iterator[int]:
    """Run `decode` on files and `convert` on batches in threads."""
    library("spdl.pipeline")
    from spdl.pipeline import PipelineBuilder

    paths, generator = photos.paths, random.Random(0)
    source = (path for _ in range(MANY_EPOCHS) for path in generator.sample(paths, len(paths)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers of PyTorch's DataLoader
    with ThreadPoolExecutor(WORKERS) as executor:
        pipeline = (
            PipelineBuilder()
            .add_source(source)
            .pipe(decode, executor=executor, concurrency=WORKERS)
            .aggregate(BATCH, drop_last=True)
            .pipe(convert)
            .add_sink(4)
            .build(num_threads=1)
        )
        try:
            with pipeline.auto_stop():
                for batch in pipeline:
                    yield len(batch)
        finally:
            torch.set_num_threads(threads)


def grain(photos: Photos) -> Iterator[int]:
    """Use Grain's worker processes, which read ArrayRecord files, as its documentation recommends."""
    library("grain")
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    transform()
    folder = photos.converted("array-record")
    file = folder / "train.array_record"
    if not file.exists():
        folder.mkdir()
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for path in photos.paths:
            writer.write(path.read_bytes())
        writer.close()
    images = (
        grain.MapDataset.source(grain.sources.ArrayRecordDataSource([str(file)]))
        .shuffle(seed=0)
        .repeat()
        .map(load_numpy)
        .batch(BATCH, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=WORKERS, per_worker_buffer_size=4))
    )
    batches = iter(images)
    try:
        for batch in batches:
            yield len(torch.from_numpy(batch))
    finally:
        batches.close()


def load_numpy(encoded: bytes) -> Any:
    torch.set_num_threads(1)  # as in the workers of PyTorch's DataLoader
    return load(encoded).numpy()
