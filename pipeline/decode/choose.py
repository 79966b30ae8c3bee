"""Choose and create the decoder of a loader."""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.decode.job import Decoder, Normalisation
from pipeline.options import LoaderOptions
from pipeline.stage_trace import StageTrace
from shards.format.manifest_fields import SplitEntry

ResolvedLoader = Literal["dali", "ffcv", "synthetic"]


def resolve_loader(options: LoaderOptions, split: SplitEntry) -> ResolvedLoader:
    """Return the loader of a split. `auto` is dali if the split has tars, ffcv if it has only a .beton."""
    if options.loader != "auto":
        return options.loader
    return "dali" if split.tars else "ffcv"


def make_decoder(
    loader: ResolvedLoader,
    options: LoaderOptions,
    *,
    batch: int,
    device: torch.device,
    evaluation: bool,
    normalisation: Normalisation | None,
    trace: StageTrace,
) -> Decoder:
    """Create a decoder. Only the library that it uses is imported.

    Args:
        loader: name of the decoder.
        options: threads, queue sizes and options of the decoder.
        batch: rows of the largest batch.
        device: device of the output.
        evaluation: whether the jobs have regions (`DecodeJob.region`).
        normalisation: normalisation for the decoder to apply. None: return uint8.
        trace: records the decoder's work.

    Raises:
        UserError: the library is not installed.
    """
    settings = options.settings
    threads, ahead = settings.decode_threads, settings.decode_ahead
    if loader == "ffcv":
        from pipeline.decode.ffcv import FfcvDecoder

        return FfcvDecoder(device=device, threads=threads, ahead=ahead, normalisation=normalisation, trace=trace)
    from pipeline.decode.dali import DaliDecoder

    return DaliDecoder(
        batch=batch,
        device=device,
        threads=threads,
        ahead=ahead,
        evaluation=evaluation,
        normalisation=normalisation,
        settings=settings,
        trace=trace,
    )
