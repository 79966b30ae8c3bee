"""What many tests share: real shard sets, made once per session."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from tests.support.commands import run_pipeline

# A shell that starts us in the background lets SIGINT be ignored, by us and by everything that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # tests of kernels run where it is not installed
    from hypothesis import Phase, settings

    # A shared machine may take longer for an example than the default of 200 ms.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
    # For tests/mutation/: the same examples every time, and no search for the smallest one that fails.
    settings.register_profile("mutation", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first: with two processes, all others then run beside it."""
    items.sort(key=lambda item: not item.name.startswith("test_in_the_interpreter"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of `pipeline sample digits`: 1437 training and 360 validation images of 64x64."""
    folder = tmp_path_factory.mktemp("digits")
    run_pipeline("sample", "digits", folder / "images")
    run_pipeline("shard", folder / "images", "--out", folder / "set", "--shard-size", "1")
    return folder / "set"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of 96 photos of ImageNet-like sizes, in several shards."""
    folder = tmp_path_factory.mktemp("photos")
    run_pipeline("sample", "photos", folder / "images", "--count", "96")
    run_pipeline("shard", folder / "images", "--out", folder / "set", "--shard-size", "2")
    return folder / "set"
