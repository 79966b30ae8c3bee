"""Run DALI's GPU graph on a CPU, with the same operators and arguments except the device."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.data_node import DataNode
from PIL import Image

from pipeline.decode import dali
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.job import DecodeJob

_ONLY_ON_GPUS = ("hw_decoder_load", "preallocate_width_hint", "preallocate_height_hint")


def decoded(size: int, photos: list[Image.Image], *, evaluation: bool, **job: Any) -> np.ndarray:
    """Decode photos with the GPU graph: uint8 [len(photos), size, size, 3].

    Args:
        size: side of the output in pixels.
        photos: the images, encoded as JPEG for the decoder.
        evaluation: whether the jobs have regions.
        job: other fields of the DecodeJob. The default window is the whole photo.
    """
    return decoded_at_sizes([size], photos, evaluation=evaluation, **job)[0]


def decoded_at_sizes(sizes: list[int], photos: list[Image.Image], *, evaluation: bool, **job: Any) -> list[np.ndarray]:
    """Decode photos once for each output size, with one graph (see `decoded`)."""
    images = [encoded(photo) for photo in photos]
    sides = np.array([photo.size[::-1] for photo in photos], np.int32)
    window = job.pop("window", np.concatenate([np.zeros_like(sides), sides], axis=1))
    # 3 images for a decoder of up to 4, because batches may be smaller than the largest.
    whole: Any = SimpleNamespace(ids=np.arange(3), images=images)
    jobs = [DecodeJob(encoded=whole, window=window, size=size, **job) for size in sizes]
    return run_graph(DaliDecoder, jobs, evaluation=evaluation)


def run_graph(kind: type[DaliDecoder], jobs: list[DecodeJob], *, evaluation: bool) -> list[np.ndarray]:
    """Run the GPU graph of a decoder on jobs of up to 4 images: uint8 [images, size, size, 3] for each job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fn.decoders, "image_slice", _image_slice(fn.decoders.image_slice))
        patch.setattr(dali, "Pipeline", lambda device_id, **options: Pipeline(device_id=None, **options))
        patch.setattr(DataNode, "gpu", lambda node: node)
        decoder = kind(batch=4, device=torch.device("cuda", 0), threads=1, evaluation=evaluation)
        inputs = [decoder._inputs(each) for each in jobs]
        graph = decoder._build(iter(inputs + inputs[-1:] * 4))  # 4 more, because DALI prefetches
        return [np.array(graph.run()[0].as_tensor()) for _ in jobs]


def encoded(photo: Image.Image) -> np.ndarray:
    """Encode as JPEG: uint8 [bytes]."""
    sink = io.BytesIO()
    photo.save(sink, "JPEG", quality=95)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _image_slice(decode: Any) -> Any:
    def on_cpu(*inputs: Any, **options: Any) -> Any:
        assert options.pop("device") == "mixed"
        for name in _ONLY_ON_GPUS:
            options.pop(name)
        return decode(*inputs, device="cpu", **options)

    return on_cpu
