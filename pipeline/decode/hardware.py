"""Find out whether a GPU's JPEG engine can decode here, and choose the share of every batch that it is given.

DALI's `decoders.image*` with `device="mixed"` decode through nvImageCodec. It gives `hw_decoder_load` of each batch to
the GPU's JPEG engine and the rest to nvJPEG's CUDA decoder. The two round differently (DALI #2232 fixes the load to 0
in tests "due to HW decoder producing slightly different image than the CUDA based decoder"), so a load between 0 and 1
makes pixels depend on the other images of the batch (the engine gets those of the least subsampled chroma, then the
largest), hence on the world size.

At the loads 0 and 1 the choice is made for each image by itself (nvImageCodec 0.8, src/image_generic_codec.h): the
engine's part is round(load * n) of the first batch's n images, rounded up to a multiple of the engine's cores and
capped at the batch, so no image is left over at 1 as long as batches have one size, as ours have. What the engine does
not decode (progressive, CMYK, 4:1:1, too large) goes to the CUDA decoder at every load, whatever else is in the batch.
A crop window does not keep an image from the engine where nvJPEG has `nvjpegDecodeBatchedEx`, "batch of images with
ROI" (all of CUDA 12). One exception remains: if the engine fails on an image that it had accepted, the CUDA decoder
decodes all of that batch.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.options import LoaderOptions
from shards.errors import first_line

# From nvjpeg.h.
BACKEND_HARDWARE = 3
ARCH_MISMATCH = 7

VIDEO_LIBRARY = "libnvcuvid.so.1"
SYSTEM_NVJPEG = ("libnvjpeg.so.12", "libnvjpeg.so.13", "libnvjpeg.so")
Load = Callable[[str], Any]
"""Opens a shared library by name; raises OSError."""


@dataclass(frozen=True)
class JpegEngine:
    """What was found out about a GPU's JPEG engine."""

    usable: bool
    found: str
    """Text for the log: how many engines there are, or why none can be used, with the remedy."""

    @property
    def load(self) -> float:
        """The `hw_decoder_load` that treats every image of a batch alike: all to the engine, or none."""
        return 1.0 if self.usable else 0.0


def find_jpeg_engine(device: torch.device) -> JpegEngine:
    """Ask nvJPEG whether it can decode on this GPU's JPEG engine.

    Args:
        device: CUDA device; on any other there is no engine.
    """
    if device.type != "cuda":
        return JpegEngine(usable=False, found="no GPU")
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # nvJPEG takes the device of the current context, so there must be one
        return query_nvjpeg(ctypes.CDLL, nvjpeg_paths())


def query_nvjpeg(load: Load, paths: list[str]) -> JpegEngine:
    """Ask the first nvJPEG of `paths` that can be opened, the way nvImageCodec does before it registers its decoder.

    nvJPEG 12.4's documentation lists engines in Ampere (A100 and A30 only), Hopper, Ada and Blackwell. nvJPEG itself is
    asked, so that no such list is kept here. It needs the driver's libnvcuvid.
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
            "NVIDIA_DRIVER_CAPABILITIES must include `video` (or be `all`)",
        )
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == ARCH_MISMATCH:
        return JpegEngine(usable=False, found="this GPU has no JPEG engine that nvJPEG can use")
    if status:
        return JpegEngine(usable=False, found=f"nvJPEG cannot use a JPEG engine here (status {status})")
    try:
        engines, cores = ctypes.c_uint(), ctypes.c_uint()
        status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    finally:
        library.nvjpegDestroy(handle)
    if status or not engines.value:
        return JpegEngine(usable=False, found="this GPU has no JPEG engine that nvJPEG can use")
    return JpegEngine(usable=True, found=f"{engines.value} JPEG engines of {cores.value} cores")


def nvjpeg_paths() -> list[str]:
    """Where nvImageCodec looks for nvJPEG: in the packages beside it, then where the system's linker does."""
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else None
    beside = [str(path) for folder in folders or () for path in Path(folder).glob("*/lib/libnvjpeg.so.*")]
    return [*sorted(beside, key=lambda path: "/nvjpeg/" not in path), *SYSTEM_NVJPEG]


def resolve_hw_decoder_load(options: LoaderOptions, device: torch.device) -> LoaderOptions:
    """Return `options` with an unset `hw_decoder_load` chosen by what the device has."""
    if device.type != "cuda" or options.dali.hw_decoder_load is not None:
        return options
    return replace(options, dali=replace(options.dali, hw_decoder_load=find_jpeg_engine(device).load))


def describe_jpeg_decoder(load: float) -> str:
    """Describe which decoder decodes JPEGs at a load."""
    if load in (0.0, 1.0):
        return "JPEG engine" if load else "CUDA decoder"
    return f"JPEG engine for {load:g} of the images, CUDA decoder for the rest"


def mixed_decoders_warning(load: float) -> str | None:
    """Return the warning for a load that divides batches between two decoders; None for other loads."""
    if load in (0.0, 1.0):
        return None
    return (
        f"warning: --hw-decoder-load {load:g}: two decoders that round differently share each batch; pixels then "
        "depend on a sample's place in its batch, and so on the number of GPUs (at 0 or 1 they do not)"
    )


def _first(load: Load, paths: list[str]) -> Any:
    """Open the first library that can be opened. Raises the last error when none can."""
    failure = OSError("no nvJPEG found")
    for path in paths:
        try:
            return load(path)
        except OSError as error:
            failure = error
    raise failure
