"""The compiled implementations of augmentation: kernel families of Triton, and functions of Numba on a CPU.

A disabled family falls back to PyTorch, which computes the same result. The state is global to the process, so that it
also applies to the threads of the loaders.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from shards.errors import first_line

if TYPE_CHECKING:
    from pipeline.augment.numba_impl.batch import CpuAugment

log = logging.getLogger(__name__)

RANDAUGMENT, FINISHING = "RandAugment", "batch finishing"
FAMILIES = (RANDAUGMENT, FINISHING)

_off: frozenset[str] = frozenset()


def available(device: torch.device) -> bool:
    """Return whether kernels are available for a device: on CUDA, if Triton is installed.

    With TRITON_INTERPRET=1, which tests set, they are available on the CPU instead.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _has_triton()


def switched_off() -> frozenset[str]:
    """Return the kernel families that are disabled."""
    return _off


def disable(*families: str) -> None:
    """Disable these kernel families from now on, in all threads, so that PyTorch does their work.

    Raises:
        ValueError: a family is unknown.
    """
    global _off  # noqa: PLW0603
    _expect_families(families)
    _off |= frozenset(families)


@contextmanager
def disabled(*families: str) -> Iterator[None]:
    """Disable exactly these kernel families inside a `with` block, in all threads.

    Raises:
        ValueError: a family is unknown.
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
        raise ValueError(f"unknown kernel family {', '.join(unknown)}; expected {', '.join(FAMILIES)}")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def load_cpu_augment() -> type[CpuAugment] | None:
    """Return the class that augments batches on a CPU, after its functions were compiled or loaded from Numba's cache.

    Returns None, with a warning, if Numba is not installed or fails. PyTorch then does the work.
    """
    try:
        from pipeline.augment.numba_impl.batch import CpuAugment, compile_functions

        compile_functions()
    except Exception as error:  # also errors of Numba, of which there are many types
        log.warning(
            "augmentation cannot be compiled (%s); PyTorch is used instead, which takes several times as long; "
            "install a version of Numba that supports this Python: pip install -U numba",
            first_line(error),
        )
        return None
    return CpuAugment
