"""Kernel families, which can be switched off one by one so that their operators fall back to plain PyTorch.

    kernels.disable("norm")                  # for the rest of the process
    with kernels.disabled("norm"): ...       # exactly these families are off in this context; for tests

The state is shared by all threads of the process, because autograd runs backward passes in other threads. It is read
inside each operator at every call, so it changes nothing for autograd and the compiler. A CUDA graph keeps the choice
from its capture.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fat.kernels import reference
from fat.kernels.ops.checks import on_tensor_device

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
"""Operator -> families whose kernels it launches, its own family last. Filled by the decorator `launches`."""

_off: frozenset[str] = frozenset()
_lock = threading.Lock()


def switched_off() -> frozenset[str]:
    """Return the families that are switched off."""
    return _off


def disable(*families: str) -> None:
    """Switch these families off for the rest of the process.

    Raises:
        ValueError: unknown family.
    """
    global _off  # noqa: PLW0603
    _check_families(families)
    with _lock:
        _off |= frozenset(families)


@contextmanager
def disabled(*families: str) -> Iterator[None]:
    """Switch exactly these families off in this context, in all threads; without arguments, switch all families on.

    Raises:
        ValueError: unknown family.
    """
    global _off  # noqa: PLW0603
    _check_families(families)
    before = _off
    _off = frozenset(families)
    try:
        yield
    finally:
        _off = before


def launches(*families: str) -> Callable[[Function], Function]:
    """Declare the families whose kernels an operator launches, its own family last. A decorator.

    If one of them is switched off, the function of the same name in `fat.kernels.reference` runs instead.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        OPERATORS[name] = families
        fallback = getattr(reference, name)

        @functools.wraps(function)
        def run(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if _off.isdisjoint(families):
                return function(first, *rest, **options)
            # `fat.kernels._cast` has already cast the arguments to autocast's dtype.
            with torch.autocast(first.device.type, enabled=False):
                return fallback(first, *rest, **options)

        return on_tensor_device(run)  # type: ignore[return-value]

    return decorate


def _check_families(families: tuple[str, ...]) -> None:
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"{', '.join(unknown)}: unknown kernel family; expected {', '.join(FAMILIES)}")
