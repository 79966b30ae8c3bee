"""Detect the GPU's JPEG engine, and choose the fraction of each batch that it decodes.

DALI's `decoders.image*` with `device="mixed"` decode through nvImageCodec, which passes the fraction `hw_decoder_load`
of each batch to the GPU's JPEG engine and the rest to nvJPEG's CUDA decoder. The two round differently (DALI #2232 sets
the load to 0 in tests "due to HW decoder producing slightly different image than the CUDA based decoder"). With a load
between 0 and 1, the engine gets the images with the least chroma subsampling, then the largest images, so pixels depend
on the other images of the batch and therefore on the world size.

With a load of 0 or 1, the decoder of an image does not depend on other images (nvImageCodec 0.8,
src/image_generic_codec.h). The engine gets round(load * n) of the first batch's n images, rounded up to a multiple of
the engine's cores and limited to the batch: at load 1 all of them, provided that no batch is larger than the first. In
this project batches have the same size; where the GPU does not decode all rows of a batch (`--cpu-decode`, `--gpu-
cache`), a first batch of which it decodes all rows precedes the others. Images that the engine does not support
(progressive, CMYK, 4:1:1, too large) go to the CUDA decoder at every load. Images with a crop window can use the engine
if nvJPEG has `nvjpegDecodeBatchedEx`, "batch of images with ROI" (all of CUDA 12). There is one exception: if the
engine fails on an image that it had accepted, the CUDA decoder decodes that whole batch.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.options import LoaderOptions, LoaderSettings
from pipeline.plan import Ids
from pipeline.rng import Stream, uniform
from shards.errors import first_line

# Constants from nvjpeg.h.
BACKEND_HARDWARE = 3
ARCH_MISMATCH = 7

VIDEO_LIBRARY = "libnvcuvid.so.1"
SYSTEM_NVJPEG = ("libnvjpeg.so.12", "libnvjpeg.so.13", "libnvjpeg.so")
Load = Callable[[str], Any]
"""Opens a shared library by name, like `ctypes.CDLL`; raises OSError if it cannot be loaded."""


@dataclass(frozen=True)
class JpegEngine:
    """The JPEG engine of a GPU, as nvJPEG reports it."""

    usable: bool
    found: str
    """Text for the log: the number of engines, or why no engine can be used and what to do."""


def find_jpeg_engine(device: torch.device) -> JpegEngine:
    """Query nvJPEG for the JPEG engine of a device. Devices other than CUDA devices have none."""
    if device.type != "cuda":
        return JpegEngine(usable=False, found="no GPU")
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # create a CUDA context: nvJPEG uses the device of the current context
        return query_nvjpeg(ctypes.CDLL, nvjpeg_paths())


def query_nvjpeg(load: Load, paths: list[str]) -> JpegEngine:
    """Query the first nvJPEG of `paths` that can be loaded, with the calls that nvImageCodec uses to find an engine.

    nvJPEG also requires the driver's libnvcuvid. According to its 12.4 documentation, Ampere (A100 and A30 only),
    Hopper, Ada and Blackwell GPUs have engines; querying nvJPEG avoids keeping such a list.

    Args:
        load: opens a shared library.
        paths: names or paths of nvJPEG, in the order in which they are tried.
    """
    try:
        library = _first(load, paths)
    except OSError as error:
        return JpegEngine(usable=False, found=f"nvJPEG cannot be loaded ({first_line(error)})")
    try:
        load(VIDEO_LIBRARY)
    except OSError:
        return JpegEngine(
            usable=False,
            found=f"the driver's {VIDEO_LIBRARY} cannot be loaded, so no JPEG engine can be used; in a container, "
            "set NVIDIA_DRIVER_CAPABILITIES to `all` or include `video` in it",
        )
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == ARCH_MISMATCH:
        return JpegEngine(usable=False, found="this GPU has no JPEG engine that nvJPEG can use")
    if status:
        return JpegEngine(
            usable=False, found=f"nvJPEG cannot use this GPU's JPEG engine (nvjpegCreateEx returned status {status})"
        )
    try:
        engines, cores = ctypes.c_uint(), ctypes.c_uint()
        status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    finally:
        library.nvjpegDestroy(handle)
    if status or not engines.value:
        return JpegEngine(usable=False, found="this GPU has no JPEG engine that nvJPEG can use")
    return JpegEngine(usable=True, found=f"{engines.value} JPEG engines of {cores.value} cores")


def nvjpeg_paths() -> list[str]:
    """Return where nvImageCodec looks for nvJPEG: NVIDIA's Python packages, then the system's libraries."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    installed = [str(path) for folder in folders or () for path in Path(folder).glob("*/lib/libnvjpeg.so.*")]
    return [*sorted(installed, key=lambda path: "/nvjpeg/" not in path), *SYSTEM_NVJPEG]


def resolve_hw_decoder_load(options: LoaderOptions, device: torch.device) -> LoaderOptions:
    """Set an unset `hw_decoder_load`: DALI's default if the device has a usable JPEG engine, else 0."""
    if device.type != "cuda" or options.dali.hw_decoder_load is not None:
        return options
    from pipeline.decode.dali_graph import default_hw_decoder_load

    load = default_hw_decoder_load() if find_jpeg_engine(device).usable else 0.0
    return replace(options, dali=replace(options.dali, hw_decoder_load=load))


def rows_decoded_on_cpu(ids: Ids, fraction: float) -> NDArray[np.bool_]:
    """Return which samples the CPU decodes while the GPU decodes the others, bool [n].

    It is a function of the sample alone, so that the same decoder decodes a sample in every batch and on every rank.

    Args:
        ids: int64 [n], sample ids.
        fraction: expected fraction of all samples (`--cpu-decode`).
    """
    return uniform(Stream.CPU_DECODE, ids) < fraction


def describe_jpeg_decoder(settings: LoaderSettings) -> str:
    """Describe which decoders decode JPEGs on a GPU with these settings."""
    load, by_cpu = settings.hw_decoder_load, settings.cpu_decode
    if load in (0.0, 1.0):
        shown = "JPEG engine" if load else "CUDA decoder"
    else:
        shown = f"JPEG engine for {load:g} of the images, CUDA decoder for the rest"
    return f"{shown}; the CPU decodes {by_cpu:g} of all images" if by_cpu else shown


def mixed_decoders_note(load: float) -> str | None:
    """Return a note if this `hw_decoder_load` divides batches between two decoders, else None."""
    if load in (0.0, 1.0):
        return None
    return (
        f"note: --hw-decoder-load {load:g}: each batch is divided between two decoders that round differently, so "
        "pixels depend on a sample's position in its batch and on the number of GPUs; use 0 or 1 to avoid this"
    )


def _first(load: Load, paths: list[str]) -> Any:
    """Open the first library that can be opened. Raise the last error if none can."""
    failure = OSError("nvJPEG was not found")
    for path in paths:
        try:
            return load(path)
        except OSError as error:
            failure = error
    raise failure
