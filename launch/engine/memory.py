"""Check that batches and activations fit into memory, before anything is allocated."""

from __future__ import annotations

import torch

from launch.engine.execution import zero_and_precision
from launch.feed import Feed
from launch.machine.world import World
from pipeline.decode.choose import resolve_loader
from shards.memory import GIB, check_memory

# Lower bound on the float32 activations that are kept for the backward pass, in bytes per pixel of an image: FAT-B0
# keeps 1,354 bytes (`fat.count`), and the other variants keep more.
ACTIVATION_BYTES_PER_PIXEL = 1000
CHANNELS = 3


def check_batches_fit(feed: Feed) -> None:
    """Check that the batches of all ranks on this machine fit into its memory, by a lower bound on their size.

    The bound counts encoded images that are read ahead, decoded batches and, on CPUs, activations of FAT. It does not
    count weights, because they do not depend on the options that the message names.

    Raises:
        UserError: they do not fit; the message names these options, the memory that they need and that of the machine.
    """
    data, settings, world = feed.recipe.data, feed.loader_options.settings, feed.world
    largest = max(feed.phases, key=lambda phase: phase.shape.micro_rows * phase.augment.size**2)
    rows, pixels, eval_pixels = largest.shape.micro_rows, largest.augment.size**2, data.evaluation_size**2
    _, precision = zero_and_precision(feed.recipe.parallel, world.device, ranks=world.size)
    itemsize = 2 if precision == "bf16" else 4
    # Memory holds all micro-batches of the current step, the batches that are ready, and those being decoded (as
    # uint8). Evaluation has separate batches.
    ahead = settings.ready * itemsize + settings.decode_ahead
    training = (feed.shape.rank_rows * itemsize + rows * ahead) * pixels
    batches = (training + feed.eval_rows * (itemsize + ahead) * eval_pixels) * CHANNELS
    encoded = int(feed.dataset.index("train")["size"].mean()) * rows * settings.read_ahead
    activations = rows * pixels * ACTIVATION_BYTES_PER_PIXEL * itemsize // 4 if feed.recipe.model.spec.is_fat else 0
    what = (
        f"--global-batch {data.global_batch}, --size {largest.augment.size}: {feed.shape.rank_rows:,} images per rank, "
        f"{rows:,} per forward pass, {feed.eval_rows:,} per evaluation step, --read-ahead {settings.read_ahead}, "
        f"--decode-ahead {settings.decode_ahead}, --ready {settings.ready}"
    )
    if settings.gpu_cache and resolve_loader(data.loader, feed.dataset.split("train")) == "dali":
        what += f", --gpu-cache {settings.gpu_cache:g}"
        batches += int(settings.gpu_cache * GIB)
    remedy = (
        "use a smaller --size, --global-batch, --micro-batch, --eval-batch or --gpu-cache, or fewer batches ahead"
    )
    if world.device.type == "cuda":
        check_memory(what, encoded * world.local_size, remedy)
    else:
        batches += encoded + activations
    check_device_memory(what, batches, remedy, world)


def check_device_memory(what: str, needed: float, remedy: str, world: World) -> None:
    """Check that `needed` bytes per rank fit into device memory; on CPUs, the ranks of this machine share its memory.

    Raises:
        UserError: see `shards.memory.check_memory`.
    """
    if world.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(world.device)
        check_memory(what, needed, remedy, available=total, of="this GPU")
    else:
        check_memory(what, needed * world.local_size, remedy)
