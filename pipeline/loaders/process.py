"""Rank, world size and device of this process, for loaders that are not told."""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist

from shards.errors import UserError
from shards.redact import printable


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """Return the rank and the world size of this process.

    Args:
        rank, world: returned if they are given. None: those of torch.distributed if it is initialized, else those in
            the environment variables RANK and WORLD_SIZE, which torchrun and accelerate set, else 0 and 1.

    Raises:
        UserError: only one of the two is given or set, or a variable is not a number.
    """
    if rank is not None and world is not None:
        return rank, world
    if rank is not None or world is not None:
        raise UserError(f"rank {rank} and world {world}: give both, or neither to use those of this process")
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not given:
        return 0, 1
    if len(given) == 1:
        ((name, value),) = given.items()
        other = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}[name]
        raise UserError(f"{name} is {printable(value)}, but {other} is not set: start with torchrun, or set both")
    return _number("RANK", given["RANK"]), _number("WORLD_SIZE", given["WORLD_SIZE"])


def local_world() -> int:
    """Return the number of processes on this machine that torchrun or accelerate started; 1 without them."""
    return max(_number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device of a loader: cpu, or cuda with an index.

    Args:
        device: None: the GPU of this process, which is that of LOCAL_RANK if it is set, else CUDA's current device; the
            CPU on a machine without GPUs.

    Raises:
        UserError: the name is unknown, or there is no such GPU.
    """
    if device is None:
        device = _default_device()
    if not re.fullmatch(r"cpu(:0)?|cuda(:\d{1,4})?", str(device)):
        raise UserError(f"device {printable(str(device))}: expected cpu, cuda or cuda:N")
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {device}: this process has no GPU that torch can use; use cpu")
    count = torch.cuda.device_count()
    # torch.cuda.set_device requires an index
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise UserError(f"device {device}: this process has {count} GPUs, cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    # A launcher may show each process a single GPU.
    return torch.device("cuda", _number("LOCAL_RANK", os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def _number(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise UserError(f"{name} is {printable(value)}: expected a whole number")
    return int(value)
