"""This project's loaders, and those of the libraries whose decoders they use: DALI's and FFCV's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from benchmarks.loaders.work import BATCH, MANY_EPOCHS, RECIPE, SIZE, WORKERS, Photos, library
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.options import LoaderName
from pipeline.plan import TrainPlan


def ours(photos: Photos, device: torch.device, loader: LoaderName, recipe: str = "light") -> Iterator[int]:
    if loader == "ffcv":
        library("ffcv.loader")
    dataset, augment = photos.dataset, augment_recipe(recipe, size=SIZE)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=BATCH, seed=0, pairs=augment.mixes)
    shape = BatchShape(global_batch=BATCH, pairs=augment.mixes)
    options = LoaderOptions(loader=loader)
    with TrainLoader(dataset, plan, shape, augment, epochs=MANY_EPOCHS, device=device, options=options) as batches:
        for batch in batches.stream():
            yield len(batch.images)


@pipeline_def
def dali_pipeline(tars: list[str], indexes: list[str], device: str) -> Any:
    encoded, _ = fn.readers.webdataset(  # type: ignore[misc]
        paths=tars, index_paths=indexes, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1024, dont_use_mmap=True
    )
    images = fn.decoders.image_random_crop(
        encoded,
        device=device,
        output_type=types.RGB,
        random_area=list(RECIPE.scale),
        random_aspect_ratio=list(RECIPE.ratio),
    )
    images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * m for m in RECIPE.mean],
        std=[255 * s for s in RECIPE.std],
        mirror=fn.random.coin_flip(),
    )


def dali(photos: Photos, device: torch.device) -> Iterator[int]:
    tars, gpu = photos.tars, device.type == "cuda"
    pipe = dali_pipeline(
        tars,
        [tar.removesuffix(".tar") + ".idx" for tar in tars],
        "mixed" if gpu else "cpu",
        batch_size=BATCH,
        num_threads=WORKERS,
        device_id=0 if gpu else None,
    )
    while True:
        (images,) = pipe.run()
        yield len(torch.from_dlpack(images.as_tensor()))


def ffcv(photos: Photos, device: torch.device) -> Iterator[int]:
    library("ffcv.loader")
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    mean, std = (np.array(values) * 255 for values in (RECIPE.mean, RECIPE.std))
    on_gpu = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    beton = photos.dataset.split("train").beton
    assert beton is not None
    loader = Loader(
        str(photos.shards / beton.name),
        batch_size=BATCH,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((SIZE, SIZE), RECIPE.scale, RECIPE.ratio),
                RandomHorizontalFlip(),
                NormalizeImage(mean, std, np.float32),
                ToTensor(),
                *on_gpu,
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        for images, _ in loader:
            yield len(images)
