"""Which decoder works for a loader."""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.decode.job import Decoder, Normalisation
from pipeline.options import LoaderOptions
from shards.format.manifest_fields import SplitEntry

Chosen = Literal["dali", "ffcv", "synthetic"]


def resolve_loader(options: LoaderOptions, split: SplitEntry) -> Chosen:
    """What `auto` comes to: DALI for tars, FFCV for a .beton that stands alone."""
    if options.loader != "auto":
        return options.loader
    return "dali" if split.tars else "ffcv"


def make_decoder(
    loader: Chosen,
    options: LoaderOptions,
    *,
    size: int,
    batch: int,
    device: torch.device,
    evaluation: bool,
    normalisation: Normalisation | None,
) -> Decoder:
    """A decoder of batches of up to `batch` rows, `size` pixels a side; libraries are imported only where needed.

    Args:
        evaluation: its jobs carry regions.
        normalisation: to be done by the decoder.

    Raises:
        UserError: the library is not installed.
    """
    settings = options.settings
    threads, ahead = settings.decode_threads, settings.decode_ahead
    if loader == "ffcv":
        from pipeline.decode.ffcv import FfcvDecoder

        return FfcvDecoder(size=size, device=device, threads=threads, ahead=ahead, normalisation=normalisation)
    from pipeline.decode.dali import DaliDecoder

    return DaliDecoder(
        size=size,
        batch=batch,
        device=device,
        threads=threads,
        ahead=ahead,
        evaluation=evaluation,
        normalisation=normalisation,
        settings=settings,
    )
