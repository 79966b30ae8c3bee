"""The graph of DALI operators of a decoder: decode, crop, and on a GPU also resize, flip and normalize.

    encoded -> decode window             `--decode window`: only the crop window is decoded
    encoded -> decode image -> crop      `--decode whole`: also for images that the cache delivers
    windows of stored pixels
    -> resize -> flip -> normalize       on GPUs; on a CPU, `pipeline.decode.resize` does this faster

The rows of a batch may come from different sources: DALI's decoder on the GPU, its decoder on the CPU (`--cpu-decode`),
and the cache of decoded images (`--gpu-cache`). DALI's conditional execution divides each batch accordingly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.backend import GetSchema, TensorCPU, TensorGPU  # type: ignore[attr-defined]

from pipeline.decode.job import Normalization
from pipeline.options import LoaderSettings


@dataclass(frozen=True, kw_only=True)
class DaliGraph:
    """Description of the graph of one decoder.

    The inputs of a batch are, in this order: encoded images; if `crops`, start and shape of the windows; if `on_gpu`,
    the output size, and start and end of the regions (`evaluation`) or the flips; if `shares_cpu`, for each row whether
    the CPU decodes it; if `cached`, for each row whether the cache delivers it.

    Args:
        on_gpu: decode with DALI's `mixed` operators, and resize. Else decode on the CPU.
        evaluation: whether the inputs have regions.
        normalization: normalization to apply on a GPU; None: uint8.
        shares_cpu: whether some rows are decoded on the CPU, although `on_gpu`.
        cached: whether some rows are delivered by a cache of decoded images.
        pixels: whether the first input is not encoded images, but decoded windows in CPU memory.
        settings: options of the decoder.
    """

    on_gpu: bool
    evaluation: bool = False
    normalization: Normalization | None = None
    shares_cpu: bool = False
    cached: bool = False
    pixels: bool = False
    settings: LoaderSettings = field(default_factory=LoaderSettings)

    @property
    def whole(self) -> bool:
        """Whether whole images are decoded."""
        return self.settings.decode == "whole" and not self.pixels

    @property
    def crops(self) -> bool:
        """Whether the graph crops the windows; whole images on a CPU are cropped by the caller, without a copy."""
        return (self.on_gpu or not self.whole) and not self.pixels

    @property
    def inputs(self) -> int:
        """Number of inputs, without the cached images."""
        for_gpu = 3 if self.evaluation else 2
        return 1 + 2 * self.crops + for_gpu * self.on_gpu + self.shares_cpu + self.cached

    def build(
        self,
        source: Iterator[tuple[Any, ...]],
        cached: Iterator[list[Any]] | None = None,
        *,
        batch: int,
        threads: int,
        ahead: int,
        device: torch.device,
    ) -> Pipeline:
        """Build DALI's pipeline.

        Its outputs are the images: on a GPU [n, size, size, 3], else the windows or whole images; and, on a GPU with
        `cached`, also the whole images.

        Args:
            source: yields the inputs of each batch, whose memory the caller keeps alive.
            cached: with `cached`: yields the images from the cache for each batch, uint8 [height, width, 3] of any
                size in rows that the cache does not deliver.
            batch: rows of the largest batch.
            threads: CPU threads.
            ahead: number of batches that DALI prefetches.
            device: device of the images.
        """
        define = pipeline_def(enable_conditionals=self.shares_cpu or self.cached)(_graph)
        pipeline: Pipeline = define(
            self,
            source,
            cached,
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if self.on_gpu else None,
            prefetch_queue_depth=ahead,
            seed=0,
        )
        return pipeline

    def decode(self, encoded: Any, window: dict[str, Any], *, on_cpu: bool) -> Any:
        """Decode the windows, or whole images.

        Args:
            window: start, shape and axis names of the windows.
        """
        # The heights and widths in the index ignore the EXIF orientation, as does the reference recipe.
        options: dict[str, Any] = {"device": "cpu", "adjust_orientation": False, "output_type": types.RGB}
        if not on_cpu:
            options |= {
                "device": "mixed",
                "hw_decoder_load": self.settings.hw_decoder_load,
                "preallocate_width_hint": self.settings.preallocate_width,
                "preallocate_height_hint": self.settings.preallocate_height,
            }
        if self.whole:
            return fn.decoders.image(encoded, **options)
        return fn.decoders.image_slice(encoded, **window, **options)

    def resize(self, images: Any, size: Any, *rest: Any) -> Any:
        """Resize, flip and normalize windows on the GPU."""
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
        if self.normalization is None:
            return fn.flip(images, horizontal=mirror["mirror"]) if mirror else images
        scale = [[255 * value for value in values] for values in (self.normalization.mean, self.normalization.std)]
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="HWC", mean=scale[0], std=scale[1], **mirror
        )


def _graph(graph: DaliGraph, source: Iterator[tuple[Any, ...]], cached: Iterator[list[Any]] | None) -> Any:
    # Without no_copy, this thread would copy while holding the interpreter lock (2.5 of 3.8 ms for 256 photos). The
    # decoder keeps the arrays alive until DALI has decoded them.
    layout = ["HWC", *[""] * (graph.inputs - 1)] if graph.pixels else None
    inputs = fn.external_source(source=source, num_outputs=graph.inputs, batch=True, no_copy=True, layout=layout)
    encoded, *rest = inputs if graph.inputs > 1 else (inputs,)
    window = {"start": rest.pop(0), "shape": rest.pop(0), "axis_names": "HW"} if graph.crops else {}
    if graph.cached:
        # DALI copies these images together, on the stream on which the cache writes them: the current one.
        stored = fn.external_source(
            source=cached,
            batch=True,
            device="gpu" if graph.on_gpu else "cpu",
            cuda_stream=torch.cuda.current_stream() if graph.on_gpu else None,
            use_copy_kernel=graph.on_gpu,
        )
        hit = rest.pop()
    by_cpu = rest.pop() if graph.shares_cpu else None
    if not graph.cached:
        images = _decoded(graph, encoded, window, by_cpu)
    elif hit:
        images = stored
    else:
        images = _decoded(graph, encoded, window, by_cpu)
    if not graph.on_gpu:
        return images
    windows = fn.slice(images, **window) if graph.whole else images
    resized = graph.resize(windows, *rest)
    return (resized, images) if graph.cached else resized


def _decoded(graph: DaliGraph, encoded: Any, window: dict[str, Any], by_cpu: Any) -> Any:
    """Decode on GPU and CPU; the result is on the graph's device."""
    if graph.pixels:
        images = encoded.gpu()
    elif not graph.shares_cpu:
        images = graph.decode(encoded, window, on_cpu=not graph.on_gpu)
    elif by_cpu:
        images = graph.decode(encoded, window, on_cpu=True).gpu()
    else:
        images = graph.decode(encoded, window, on_cpu=False)
    return images


def wrap_for_dali(pixels: torch.Tensor) -> TensorCPU | TensorGPU:
    """Wrap the memory of an image for DALI, without a copy.

    Args:
        pixels: uint8 [height, width, 3], contiguous.
    """
    wrap = TensorGPU if pixels.is_cuda else TensorCPU
    return wrap(torch.utils.dlpack.to_dlpack(pixels), "HWC")


def default_hw_decoder_load() -> float:
    """Return DALI's own default of `hw_decoder_load`, for GPUs with a JPEG engine: 0.65 in DALI 2.4.

    It was 0.9 in versions before DALI #6366, which measured a longer tail of decoding times at 0.9 than at 0.65.
    """
    return float(GetSchema("decoders__ImageSlice").GetArgumentDefaultValueString("hw_decoder_load"))
