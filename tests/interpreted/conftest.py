"""Tests in Triton's interpreter, on CPU tensors. Triton reads TRITON_INTERPRET when it is imported, so these tests run
in a separate process, which tests/unit/test_kernels.py starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.kernel_checks import poisoned_memory

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix tl.dot of bfloat16, which Triton 3.7's interpreter stores as 16-bit integers and multiplies as such."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


@pytest.fixture(scope="session", autouse=True)
def _patched_once() -> Iterator[None]:
    """Speed up Triton 3.7's interpreter by a third. It searches its language module for functions to patch whenever a
    kernel calls a function, and creates a table of dtypes for every operation; here it does both once."""
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set[int]()
    np_dtype, known = interpreter._get_np_dtype, dict[str, Any]()

    def replace_once(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace not in replaced:
            replaced.add(namespace)
            replace(function)
        return interpreter._LangPatchScope()  # an empty scope: nothing to restore

    def known_dtype(dtype: Any) -> Any:
        dtype = dtype.scalar
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter, "_get_np_dtype", known_dtype)
        yield
