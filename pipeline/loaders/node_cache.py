"""Create the memory cache once per node: the first process of a node allocates it, the others open it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from pipeline.loaders.process import local_world
from pipeline.storage.memory_cache.layout import CacheLayout
from pipeline.storage.memory_cache.shared_pixels import SharedPixels, allocate, open_shared
from shards.errors import UserError
from shards.memory import GIB, free_memory

T = TypeVar("T")


def open_node_cache(layout: CacheLayout, *, world: int) -> SharedPixels:
    """Return the cache of this node. Collective with `world` > 1: all ranks call it with the same layout.

    Args:
        world: number of processes of the training.

    Raises:
        UserError: the cache needs more memory than is free on a node, or its processes cannot share it. Raised in all
            processes.
    """
    if world == 1:
        return _allocate(layout)
    if not dist.is_initialized() or dist.get_world_size() != world:
        if local_world() == 1:  # one process per machine
            return _allocate(layout)
        raise UserError(
            f"--memory-cache: the {local_world()} processes of this machine share one cache, which needs "
            "torch.distributed; call torch.distributed.init_process_group before the loader is created, or use "
            "memory_cache=0"
        )
    nodes = _gathered(_node)
    first = nodes.index(nodes[dist.get_rank()]) == dist.get_rank()
    created: list[SharedPixels] = []

    def create() -> str:
        if not first:
            return ""
        created.append(_allocate(layout))
        return created[0].path

    path = _gathered(create)[nodes.index(nodes[dist.get_rank()])]
    return _opened(lambda: created[0] if created else SharedPixels(layout, open_shared(path)))


def _allocate(layout: CacheLayout) -> SharedPixels:
    free = free_memory()
    if layout.size > free:
        raise UserError(
            f"--memory-cache: needs {layout.size / GIB:,.1f} GiB of memory, but {free / GIB:,.1f} GiB are free on this "
            "machine or in its container; use a smaller cache or a smaller --memory-cache-short-side"
        )
    return SharedPixels(layout, allocate(layout.size))


def _node() -> str:
    """Identify the processes that can open each other's memory: those of one machine, container and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.geteuid()}"


def _gathered(make: Callable[[], T]) -> list[T]:
    """Return the results of all ranks, ordered by rank, or raise the first error in all of them. Collective."""
    result: tuple[T | None, UserError | None]
    try:
        result = make(), None
    except UserError as error:
        result = None, error
    results: list[tuple[T, UserError | None]] = [(None, None)] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(results, result)
    for _, failed in results:
        if failed is not None:
            raise failed
    return [value for value, _ in results]


def _opened(open_cache: Callable[[], SharedPixels]) -> SharedPixels:
    """Return the opened cache once all ranks have opened theirs, or raise the first error everywhere. Collective."""
    opened: list[SharedPixels] = []

    def attempt() -> None:
        opened.append(open_cache())

    _gathered(attempt)
    return opened[0]
