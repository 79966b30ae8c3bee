"""Tests in Triton's interpreter, on CPU tensors. Triton reads TRITON_INTERPRET when it is first imported, so they need
a process of their own, which tests/unit/test_kernels.py starts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kernel_checks import poisoned_memory

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
