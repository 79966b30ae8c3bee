"""Choose once per run which decoder decodes JPEGs on the GPUs: the same on every rank, and kept when a run is resumed.

Two decoders round differently (`pipeline.decode.hardware`), so what a run is fed depends on this choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.feed import Feed
from pipeline.decode.choose import resolve_loader
from pipeline.decode.hardware import JpegEngine, describe_jpeg_decoder, find_jpeg_engine, mixed_decoders_warning


def choose_jpeg_decoder(feed: Feed, *, previous: float | None) -> tuple[Feed, list[str]]:
    """Choose `hw_decoder_load` for all ranks where DALI decodes on GPUs; returns the feed with it, and warnings.

    Collective.

    Args:
        previous: what the run began with, if this start resumes it.
    """
    if not decodes_on_gpu(feed):
        return feed, []
    loader = feed.recipe.data.loader
    engines = feed.world.gather(find_jpeg_engine(feed.world.device))
    load, messages = choose_load(engines, requested=loader.dali.hw_decoder_load, previous=previous)
    return feed.with_loader(dali=replace(loader.dali, hw_decoder_load=load)), messages


def decodes_on_gpu(feed: Feed) -> bool:
    """Whether DALI decodes this feed's JPEGs on a GPU."""
    loader = resolve_loader(feed.recipe.data.loader, feed.dataset.split("train"))
    return feed.world.device.type == "cuda" and loader == "dali"


def choose_load(
    engines: Sequence[JpegEngine], *, requested: float | None, previous: float | None
) -> tuple[float, list[str]]:
    """Choose `hw_decoder_load` for all ranks; returns warnings too.

    Args:
        engines: of each rank. All of them decode by CUDA where one has no engine: ranks must round alike.
        requested: by the user.
        previous: what the run began with, if this start resumes it.
    """
    without = next(((rank, engine.found) for rank, engine in enumerate(engines) if not engine.usable), None)
    able = without is None
    lacking = f"rank {without[0]} cannot use a JPEG engine ({without[1]})" if without else ""
    messages = []
    if requested is not None:
        load = requested
        if load > 0 and not able:
            messages.append(f"warning: --hw-decoder-load {load:g}: {lacking}; the CUDA decoder decodes its images")
    else:
        load = (1.0 if previous is None else previous) if able else 0.0
        if previous is None and not able and any(engine.usable for engine in engines):
            messages.append(f"warning: {lacking}, so the CUDA decoder decodes on all ranks")
    if previous is not None and load != previous:
        why = f" ({lacking})" if lacking and requested is None else ""
        messages.append(
            f"warning: JPEGs were decoded by the {describe_jpeg_decoder(previous)} when the run began, and now are by the "
            f"{describe_jpeg_decoder(load)}{why}: pixels may differ in rounding"
        )
    if shared := mixed_decoders_warning(load):
        messages.append(shared)
    return load, messages
