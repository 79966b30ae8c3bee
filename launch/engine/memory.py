"""Check that batches and activations fit into memory, from the sizes alone."""

from __future__ import annotations

import torch

from launch.engine.execution import zero_and_precision
from launch.feed import Feed
from launch.machine.world import World
from shards.memory import check_memory

# What FAT-B0 keeps of an image between forward and backward, per pixel in float32, is 1,354 bytes (`fat.count`); the
# other variants keep more.
ACTIVATION_BYTES_PER_PIXEL = 1000
CHANNELS = 3


def check_batches_fit(feed: Feed) -> None:
    """Compare the memory that a rank's batches take at least, on all ranks of this machine, with what there is.

    Counted are encoded images read ahead, decoded batches and, on CPUs, activations. The weights are not: they do not
    depend on these options.

    Raises:
        UserError: names the options that decide, what they take and what the machine has.
    """
    data, settings, world = feed.recipe.data, feed.loader_options.settings, feed.world
    rows, pixels = feed.shape.micro_rows, data.size**2
    _, precision = zero_and_precision(feed.recipe.parallel, world.device, ranks=world.size)
    itemsize = 2 if precision == "bf16" else 4
    # All micro-batches of the step in use, those that are ready, and those that are being decoded (as bytes);
    # evaluation has its own.
    ahead = settings.ready * itemsize + settings.decode_ahead
    numbers = feed.shape.rank_rows * itemsize + rows * ahead + feed.eval_rows * (itemsize + ahead)
    batches = numbers * pixels * CHANNELS
    encoded = int(feed.dataset.index("train")["size"].mean()) * rows * settings.read_ahead
    activations = rows * pixels * ACTIVATION_BYTES_PER_PIXEL * itemsize // 4
    what = (
        f"--global-batch {data.global_batch}, --size {data.size}: {feed.shape.rank_rows:,} images per rank, "
        f"{rows:,} per forward pass, {feed.eval_rows:,} per evaluation step, --read-ahead {settings.read_ahead}, "
        f"--decode-ahead {settings.decode_ahead}, --ready {settings.ready}"
    )
    remedy = "use a smaller --size, --global-batch, --micro-batch or --eval-batch, or fewer batches ahead"
    if world.device.type == "cuda":
        check_memory(what, encoded * world.local_size, remedy)
    else:
        batches += encoded + activations
    check_device_memory(what, batches, remedy, world)


def check_device_memory(what: str, needed: float, remedy: str, world: World) -> None:
    """Compare what each rank needs on its device with what there is: on CPUs, all ranks of this machine share it.

    Raises:
        UserError: see `shards.memory.check_memory`.
    """
    if world.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(world.device)
        check_memory(what, needed, remedy, available=total, of="this GPU")
    else:
        check_memory(what, needed * world.local_size, remedy)
