"""Choose the JPEG decoder of a run on GPUs: the same on every rank, and the same when the run is resumed.

The JPEG engine and the CUDA decoder round differently (`pipeline.decode.hardware`), so pixels depend on the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.feed import Feed
from pipeline.decode.choose import resolve_loader
from pipeline.decode.hardware import JpegEngine, describe_jpeg_decoder, find_jpeg_engine, mixed_decoders_warning


def choose_jpeg_decoder(feed: Feed, *, previous: float | None) -> tuple[Feed, list[str]]:
    """Choose `hw_decoder_load` for all ranks if DALI decodes on GPUs. Collective.

    Args:
        previous: value at the run's previous start; None: unknown, or a new run.

    Returns:
        The feed with the chosen value, and warnings.
    """
    if not decodes_on_gpu(feed):
        return feed, []
    loader = feed.recipe.data.loader
    engines = feed.world.gather(find_jpeg_engine(feed.world.device))
    load, messages = choose_load(engines, requested=loader.dali.hw_decoder_load, previous=previous)
    return feed.with_loader(dali=replace(loader.dali, hw_decoder_load=load)), messages


def decodes_on_gpu(feed: Feed) -> bool:
    """Return whether DALI decodes this feed's JPEGs on a GPU."""
    loader = resolve_loader(feed.recipe.data.loader, feed.dataset.split("train"))
    return feed.world.device.type == "cuda" and loader == "dali"


def choose_load(
    engines: Sequence[JpegEngine], *, requested: float | None, previous: float | None
) -> tuple[float, list[str]]:
    """Choose `hw_decoder_load` for all ranks; return it and warnings.

    Args:
        engines: the JPEG engine of each rank. All ranks must round equally, so the default is the CUDA decoder unless
            all ranks can use an engine.
        requested: value of --hw-decoder-load; None: not set.
        previous: value at the run's previous start; None: unknown, or a new run.
    """
    unusable = [f"rank {n} cannot use a JPEG engine ({e.found})" for n, e in enumerate(engines) if not e.usable]
    missing = unusable[0] if unusable else ""
    messages = []
    if requested is not None:
        load = requested
        if load > 0 and missing:
            messages.append(f"warning: --hw-decoder-load {load:g}: {missing}; the CUDA decoder decodes its images")
    else:
        load = 0.0 if missing else 1.0 if previous is None else previous
        if previous is None and missing and any(engine.usable for engine in engines):
            messages.append(f"warning: {missing}, so the CUDA decoder decodes on all ranks")
    if previous is not None and load != previous:
        why = f" ({missing})" if missing and requested is None else ""
        messages.append(
            f"warning: JPEGs were decoded by the {describe_jpeg_decoder(previous)} when the run began, and are now "
            f"decoded by the {describe_jpeg_decoder(load)}{why}: pixels may differ in rounding"
        )
    if mixed := mixed_decoders_warning(load):
        messages.append(mixed)
    return load, messages
