"""The families of augmentation's kernels: where they serve, and which of them are switched off.

A family that is switched off runs in torch, which computes the same. The state is one variable of the process, so the
loader's threads see it too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

RANDAUGMENT, FINISHING = "RandAugment", "batch finishing"
FAMILIES = (RANDAUGMENT, FINISHING)

_off: frozenset[str] = frozenset()


def available(device: torch.device) -> bool:
    """Whether there are kernels for the device: on CUDA with Triton. With TRITON_INTERPRET=1 they serve on a CPU, for
    tests."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _has_triton()


def switched_off() -> frozenset[str]:
    """The families that are switched off."""
    return _off


def disable(*families: str) -> None:
    """Run these families in torch from now on.

    Raises:
        ValueError: there is no such family.
    """
    global _off  # noqa: PLW0603
    _expect_families(families)
    _off |= frozenset(families)


@contextmanager
def disabled(*families: str) -> Iterator[None]:
    """Switch exactly these families off inside, in all threads.

    Raises:
        ValueError: there is no such family.
    """
    global _off  # noqa: PLW0603
    _expect_families(families)
    before = _off
    _off = frozenset(families)
    try:
        yield
    finally:
        _off = before


def _expect_families(families: tuple[str, ...]) -> None:
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"{', '.join(unknown)}: no such kernel family; there are {', '.join(FAMILIES)}")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
