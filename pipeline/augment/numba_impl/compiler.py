"""Decorators that compile functions with Numba. The functions do not hold Python's global interpreter lock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with IEEE arithmetic: operations are not reordered, and there is no fused multiply-add."""
    return njit(nogil=True, error_model="numpy")(function)


def cached(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, and keep its machine code.

    It is stored in `__pycache__` next to the function's file or, if that is not writable, in the user's cache folder.
    It is compiled again if the file changes, but not if only a function that it calls changes: keep these in one file.
    """
    result = compiled(function)
    with contextlib.suppress(RuntimeError):  # neither folder can be written
        result.enable_caching()
    return result
