"""Loaders with the worker processes of PyTorch's DataLoader: JPEG files, webdataset, mosaicml-streaming and litData."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.loaders.work import BATCH, MANY_EPOCHS, RECIPE, SIZE, WORKERS, Photos, library, load, transform
from pipeline.augment.params import crop_windows, flips

WORKER_OPTIONS: dict[str, Any] = {
    "num_workers": WORKERS,
    "prefetch_factor": 4,
    "persistent_workers": True,
    "multiprocessing_context": "fork",  # Linux's default; litData and Grain change it for the whole process
}


class PilFiles(torch.utils.data.Dataset[Tensor]):
    """A data set as in a plain PyTorch script, with the same crop windows as ours."""

    def __init__(self, photos: Photos) -> None:
        self.paths = photos.paths
        self.mean = np.array(RECIPE.mean, np.float32) * 255
        self.std = np.array(RECIPE.std, np.float32) * 255

    def __len__(self) -> int:
        return len(self.paths) * MANY_EPOCHS

    def __getitem__(self, item: int) -> Tensor:
        epoch, number = divmod(item, len(self.paths))
        ids = np.array([number])
        image: Image.Image = Image.open(self.paths[number])
        sizes = {"heights": np.array([image.height]), "widths": np.array([image.width])}
        y, x, height, width = crop_windows(RECIPE, seed=0, epoch=epoch, ids=ids, **sizes)[0].tolist()
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + width, y + height))
        if flips(RECIPE, seed=0, epoch=epoch, ids=ids)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)


def pil(photos: Photos) -> Iterator[int]:
    for batch in torch.utils.data.DataLoader(PilFiles(photos), batch_size=BATCH, **WORKER_OPTIONS):
        yield len(batch)


class TorchvisionFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """JPEG files with torchvision's transforms."""

    def __init__(self, photos: Photos) -> None:
        self.paths, self.labels = photos.paths, photos.labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return load(self.paths[item].read_bytes()), self.labels[item]


def torchvision(photos: Photos) -> Iterator[int]:
    transform()
    files = TorchvisionFiles(photos)
    yield from epochs(torch.utils.data.DataLoader(files, BATCH, shuffle=True, drop_last=True, **WORKER_OPTIONS))


def webdataset(photos: Photos) -> Iterator[int]:
    """Resampled shards and a shuffle buffer of 1024, on the tars of this project."""
    wds = library("webdataset")
    transform()
    samples = (
        wds.WebDataset(photos.tars, resampled=True, shardshuffle=False)
        .shuffle(1024)
        .to_tuple("jpg", "cls")
        .map_tuple(load, int)
        .batched(BATCH, partial=False)
    )
    yield from epochs(wds.WebLoader(samples, batch_size=None, **WORKER_OPTIONS))


def mosaicml(photos: Photos) -> Iterator[int]:
    """StreamingDataset with its default shuffle, on MDS shards on the local disk."""
    streaming = library("streaming")
    transform()
    folder = photos.converted("mds")
    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
            for path, label in zip(photos.paths, photos.labels, strict=True):
                writer.write({"image": path.read_bytes(), "label": label})
    streaming.base.util.clean_stale_shared_memory()

    class Images(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            return load_sample(super().__getitem__(at))

    images = Images(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    yield from epochs(streaming.StreamingDataLoader(images, BATCH, drop_last=True, **WORKER_OPTIONS))


def load_sample(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return load(sample["image"]), sample["label"]


def read_sample(item: tuple[Path, int]) -> dict[str, Any]:
    return {"image": item[0].read_bytes(), "label": item[1]}


def litdata(photos: Photos) -> Iterator[int]:
    """StreamingDataset with shuffle, on optimized chunks on the local disk."""
    library("litdata")
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    transform()
    folder = photos.converted("litdata")
    if not folder.exists():
        items = list(zip(photos.paths, photos.labels, strict=True))
        with contextlib.redirect_stdout(io.StringIO()):
            optimize(read_sample, items, str(folder), chunk_bytes="64MB", num_workers=1)

    images = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=load_sample)
    yield from epochs(StreamingDataLoader(images, batch_size=BATCH, drop_last=True, **WORKER_OPTIONS))


def epochs(loader: Any) -> Iterator[int]:
    """Yield the sizes of the batches (images, labels) of a loader, epoch after epoch."""
    for _ in itertools.count():
        for images, _ in loader:
            yield len(images)
