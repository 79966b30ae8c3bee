"""Choose and create the decoder of a loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from pipeline.decode.job import Decoder, Normalization
from pipeline.decode.pixels import PixelsDecoder, SplitBatchDecoder
from pipeline.options import LoaderOptions
from pipeline.stage_trace import StageTrace
from pipeline.storage.placement import StoredPixels, stored_pixels
from shards.format.manifest_fields import SplitEntry
from shards.memory import GIB

if TYPE_CHECKING:  # not at run time: the module imports DALI
    from pipeline.decode.decoded_cache import DecodedCache

ResolvedLoader = Literal["dali", "ffcv", "synthetic"]


def resolve_loader(options: LoaderOptions, split: SplitEntry) -> ResolvedLoader:
    """Return the loader of a split. `auto` is ffcv if the split has only a .beton with JPEGs, else dali."""
    if options.loader != "auto":
        return options.loader
    return "dali" if split.tars or stored_pixels(split, beton=False) == "all" else "ffcv"


def make_decoder(
    loader: ResolvedLoader,
    options: LoaderOptions,
    *,
    batch: int,
    device: torch.device,
    evaluation: bool,
    normalization: Normalization | None,
    cache: DecodedCache | None,
    trace: StageTrace,
    pixels: StoredPixels = "none",
) -> Decoder:
    """Create a decoder. Only the library that it uses is imported.

    Args:
        loader: name of the decoder.
        options: threads, queue sizes and options of the decoder.
        batch: rows of the largest batch.
        device: device of the output.
        evaluation: whether the jobs have regions (`DecodeJob.region`).
        normalization: normalization for the decoder to apply. None: return uint8.
        cache: cache of decoded images, only with the loader `dali` and without `pixels`.
        trace: records the decoder's work.
        pixels: which samples arrive as pixels instead of JPEGs.

    Raises:
        UserError: the library is not installed.
    """
    settings = options.settings
    threads, ahead = settings.decode_threads, settings.decode_ahead
    if loader == "ffcv":
        from pipeline.decode.ffcv import FfcvDecoder

        return FfcvDecoder(device=device, threads=threads, ahead=ahead, normalization=normalization, trace=trace)
    on_cpu = device.type == "cpu"
    if on_cpu and pixels == "all":
        return PixelsDecoder(threads=threads, ahead=ahead, normalization=normalization, trace=trace)
    from pipeline.decode.dali import DaliDecoder
    from pipeline.decode.dali_pixels import DaliPixelsDecoder

    def dali(decoder: type[DaliDecoder], *, rows_vary: bool = False) -> DaliDecoder:
        return decoder(
            batch=batch,
            device=device,
            threads=threads,
            ahead=ahead,
            evaluation=evaluation,
            normalization=normalization,
            settings=settings,
            cache=cache,
            rows_vary=rows_vary,
            trace=trace,
        )

    if pixels == "none":
        return dali(DaliDecoder)
    if pixels == "all":
        return dali(DaliPixelsDecoder)
    on_device = (
        PixelsDecoder(threads=threads, ahead=ahead, normalization=normalization, trace=trace)
        if on_cpu
        else dali(DaliPixelsDecoder)
    )
    return SplitBatchDecoder(on_device, dali(DaliDecoder, rows_vary=True), device)


def make_cache(gib: float, device: torch.device) -> DecodedCache | None:
    """Create the cache of decoded images of DALI's decoder, `gib` GiB on a device; None if it is 0.

    Raises:
        UserError: the device has less memory.
    """
    if not gib:
        return None
    from pipeline.decode.decoded_cache import DecodedCache

    return DecodedCache(int(gib * GIB), device)
