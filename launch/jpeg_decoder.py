"""Choose the JPEG decoders of a run on GPUs: the same on every rank, and the same when the run is resumed.

Decoders round differently (`pipeline.decode.hardware`), so pixels depend on the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.feed import Feed
from pipeline.decode.choose import resolve_loader
from pipeline.decode.hardware import (
    JpegEngine,
    describe_jpeg_decoder,
    find_jpeg_engine,
    mixed_decoders_note,
)
from pipeline.options import DaliOptions, LoaderOptions, LoaderSettings


def choose_jpeg_decoder(feed: Feed, *, previous: DaliOptions | None) -> tuple[Feed, list[str]]:
    """Choose `hw_decoder_load`, `decode` and `cpu_decode` for all ranks if DALI decodes on GPUs. Collective.

    Args:
        previous: options at the run's previous start; None: unknown, or a new run.

    Returns:
        The feed with the chosen values, and messages.
    """
    if not decodes_on_gpu(feed):
        return feed, []
    engines = feed.world.gather(find_jpeg_engine(feed.world.device))
    dali, messages = choose_decoders(engines, requested=feed.recipe.data.loader.dali, previous=previous)
    return feed.with_loader(dali=dali), messages


def decodes_on_gpu(feed: Feed) -> bool:
    """Return whether DALI decodes this feed's JPEGs on a GPU."""
    loader = resolve_loader(feed.recipe.data.loader, feed.dataset.split("train"))
    return feed.world.device.type == "cuda" and loader == "dali"


def choose_decoders(
    engines: Sequence[JpegEngine], *, requested: DaliOptions, previous: DaliOptions | None
) -> tuple[DaliOptions, list[str]]:
    """Choose the decoders for all ranks; return the options and messages.

    Args:
        engines: the JPEG engine of each rank. All ranks must round equally, so the default is the CUDA decoder unless
            all ranks can use an engine.
        requested: options of the command line; None: not set.
        previous: options at the run's previous start; None: unknown, or a new run.
    """
    before = previous or DaliOptions()
    load, messages = choose_load(engines, requested=requested.hw_decoder_load, previous=before.hw_decoder_load)
    chosen = replace(
        requested,
        hw_decoder_load=load,
        # The cache needs whole images.
        decode=requested.decode if requested.decode or requested.gpu_cache else before.decode,
        cpu_decode=before.cpu_decode if requested.cpu_decode is None else requested.cpu_decode,
    )
    settings = LoaderOptions(dali=chosen).settings
    chosen = replace(chosen, decode=settings.decode, cpu_decode=settings.cpu_decode)
    if previous is not None:
        earlier = LoaderOptions(dali=previous).settings
        changed = [
            f"--{name.replace('_', '-')} {getattr(earlier, name)}, and now with {getattr(settings, name)}"
            for name in ("decode", "cpu_decode")
            if getattr(earlier, name) != getattr(settings, name)
        ]
        messages += [f"warning: the run began with {text}: pixels may differ in rounding" for text in changed]
    return chosen, messages


def choose_load(
    engines: Sequence[JpegEngine], *, requested: float | None, previous: float | None
) -> tuple[float, list[str]]:
    """Choose `hw_decoder_load` for all ranks; return it and messages (see `choose_decoders`)."""
    unusable = [f"rank {n} cannot use a JPEG engine ({e.found})" for n, e in enumerate(engines) if not e.usable]
    missing = unusable[0] if unusable else ""
    messages = []
    if requested is not None:
        load = requested
        if load > 0 and missing:
            messages.append(f"warning: --hw-decoder-load {load:g}: {missing}; the CUDA decoder decodes its images")
    elif missing:
        load = 0.0
        if previous is None and any(engine.usable for engine in engines):
            messages.append(f"warning: {missing}, so the CUDA decoder decodes on all ranks")
    elif previous is not None:
        load = previous
    else:
        from pipeline.decode.dali_graph import default_hw_decoder_load  # here, because it imports DALI

        load = default_hw_decoder_load()
    if previous is not None and load != previous:
        why = f" ({missing})" if missing and requested is None else ""
        messages.append(
            f"warning: JPEGs were decoded by the {_decoder(previous)} when the run began, and are now "
            f"decoded by the {_decoder(load)}{why}: pixels may differ in rounding"
        )
    if mixed := mixed_decoders_note(load):
        messages.append(mixed)
    return load, messages


def _decoder(load: float) -> str:
    return describe_jpeg_decoder(LoaderSettings(hw_decoder_load=load))
