"""The families of kernels, and which of them are switched off: the operators of those run in plain torch.

    kernels.disable("norm")                  # for the rest of the process
    with kernels.disabled("norm"): ...       # exactly these are off inside, for tests

The state is one variable of the process, not of a thread: autograd runs backward passes in threads of its own. It is
read at every call of an operator, inside the operator, so neither autograd nor the compiler sees a difference. A CUDA
graph keeps what it was captured with.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fat.kernels import reference
from fat.kernels.ops.checks import on_its_device

Function = TypeVar("Function", bound=Callable[..., Any])

CONVOLUTION = "depthwise convolution"
INPUT_GRADIENT = "depthwise input gradient"
WEIGHT_GRADIENT = "depthwise weight gradient"
GATE = "gate"
ATTENTION = "attention"
BIAS_GRADIENT = "bias gradient"
NORM = "norm"
BATCH_NORM = "batch norm"
FAMILIES = (CONVOLUTION, INPUT_GRADIENT, WEIGHT_GRADIENT, GATE, ATTENTION, BIAS_GRADIENT, NORM, BATCH_NORM)

OPERATORS: dict[str, tuple[str, ...]] = {}
"""Operator -> the families whose kernels it launches, its own family last. Filled where the operators are defined."""

_off: frozenset[str] = frozenset()
_lock = threading.Lock()


def switched_off() -> frozenset[str]:
    """The families that are switched off."""
    return _off


def disable(*families: str) -> None:
    """Run the operators of these families in plain torch from now on.

    Raises:
        ValueError: there is no such family.
    """
    global _off  # noqa: PLW0603
    _expect_families(families)
    with _lock:
        _off |= frozenset(families)


@contextmanager
def disabled(*families: str) -> Iterator[None]:
    """Switch exactly these families off inside, in all threads; without arguments all kernels run.

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


def launches(*families: str) -> Callable[[Function], Function]:
    """Decorate the implementation of an operator that launches kernels of these families, its own family last.

    Where one of them is switched off, the operator's function of the same name in `fat.kernels.reference` runs instead.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        OPERATORS[name] = families
        in_torch = getattr(reference, name)

        @functools.wraps(function)
        def run(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if _off.isdisjoint(families):
                return function(first, *rest, **options)
            # The operator has its arguments already in the dtypes that autocast gives them.
            with torch.autocast(first.device.type, enabled=False):
                return in_torch(first, *rest, **options)

        return on_its_device(run)  # type: ignore[return-value]

    return decorate


def _expect_families(families: tuple[str, ...]) -> None:
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"{', '.join(unknown)}: no such kernel family; there are {', '.join(FAMILIES)}")
