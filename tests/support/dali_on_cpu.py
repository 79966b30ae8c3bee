"""Run DALI's GPU graph on a CPU, with the same operators and arguments except the device."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from PIL import Image

from pipeline.decode import dali_graph
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.decoded_cache import DecodedCache
from pipeline.decode.job import DecodeJob
from pipeline.options import LoaderSettings
from pipeline.storage.reader import Encoded
from shards.format.index import INDEX_DTYPE

_ONLY_ON_GPUS = ("hw_decoder_load", "preallocate_width_hint", "preallocate_height_hint")


@contextmanager
def gpu_graph_on_cpu() -> Iterator[None]:
    """Build the graphs of `DaliDecoder` for GPUs with the CPU's operators."""
    operators, define, external = fn.decoders, dali_graph.pipeline_def, fn.external_source

    def pipeline_def(**options: Any) -> Any:
        def with_cpu(function: Any) -> Any:
            build = define(**options)(function)
            return lambda *inputs, device_id, **sizes: build(*inputs, device_id=None, **sizes)

        return with_cpu

    def source_on_cpu(**options: Any) -> Any:
        return external(**(options | {"device": "cpu", "cuda_stream": None, "use_copy_kernel": None}))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("image", "image_slice"):
            patch.setattr(fn.decoders, name, _on_cpu(getattr(operators, name)))
        patch.setattr(dali_graph, "pipeline_def", pipeline_def)
        patch.setattr(fn, "external_source", source_on_cpu)
        patch.setattr(DataNode, "gpu", lambda node: node)
        patch.setattr(torch.cuda, "current_stream", lambda: None)
        yield


def decoded(size: int, photos: list[Image.Image], *, evaluation: bool, **job: Any) -> np.ndarray:
    """Decode photos with the GPU graph: uint8 [len(photos), size, size, 3].

    Args:
        size: side of the output in pixels.
        photos: the images, encoded as JPEG for the decoder.
        evaluation: whether the jobs have regions.
        job: other fields of the DecodeJob. The default window is the whole photo.
    """
    return decoded_at_sizes([size], photos, evaluation=evaluation, **job)[0]


def decoded_at_sizes(
    sizes: list[int],
    photos: list[Image.Image],
    *,
    evaluation: bool,
    settings: LoaderSettings | None = None,
    cache: DecodedCache | None = None,
    **job: Any,
) -> list[np.ndarray]:
    """Decode photos once for each output size, with one graph (see `decoded`).

    Args:
        settings, cache: see `DaliDecoder`.
    """
    jobs = [job_of(photos, size=size, **job) for size in sizes]
    return run_graph(DaliDecoder, jobs, evaluation=evaluation, settings=settings, cache=cache)


def run_graph(
    kind: type[DaliDecoder],
    jobs: list[DecodeJob],
    *,
    evaluation: bool,
    settings: LoaderSettings | None = None,
    cache: DecodedCache | None = None,
) -> list[np.ndarray]:
    """Run the GPU graph of a decoder on jobs of up to 4 images: uint8 [images, size, size, 3] for each job."""
    decoder = kind(
        batch=4,
        device=torch.device("cuda", 0),
        threads=1,
        evaluation=evaluation,
        settings=settings or LoaderSettings(),
        cache=cache,
    )
    padded = jobs + jobs[-1:] * 4  # DALI prefetches
    in_flight: deque[Any] = deque()
    found = list[np.ndarray]()
    with gpu_graph_on_cpu():
        graph = decoder._build(decoder._batches(((each, None) for each in padded), in_flight))
        while len(found) < len(jobs):
            images, *whole = graph.run()
            batch = in_flight.popleft()
            decoder._store(batch, *([np.array(image) for image in each] for each in whole))
            if not batch.warms_up:
                found.append(np.array(images.as_tensor()))
    return found


def job_of(photos: list[Image.Image], *, size: int, **job: Any) -> DecodeJob:
    """Return a job of photos with consecutive ids. The default window is the whole photo."""
    sides = np.array([photo.size[::-1] for photo in photos], np.int32)
    window = job.pop("window", np.concatenate([np.zeros_like(sides), sides], axis=1))
    rows = np.zeros(len(photos), INDEX_DTYPE)
    rows["height"], rows["width"] = sides.T
    images, raw = [encoded(photo) for photo in photos], np.zeros(len(photos), np.bool_)
    batch = Encoded(ids=np.arange(len(photos)), images=images, rows=rows, raw=raw)
    return DecodeJob(encoded=batch, window=window, size=size, **job)


def encoded(photo: Image.Image) -> np.ndarray:
    """Encode as JPEG: uint8 [bytes]."""
    sink = io.BytesIO()
    photo.save(sink, "JPEG", quality=95)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _on_cpu(decode: Any) -> Any:
    def on_cpu(*inputs: Any, **options: Any) -> Any:
        if options.pop("device") == "mixed":
            for name in _ONLY_ON_GPUS:
                options.pop(name)
        return decode(*inputs, device="cpu", **options)

    return on_cpu
