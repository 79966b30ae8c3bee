"""Fixtures of many tests: shard sets that are created once per session."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import run_pipeline

# A shell that starts pytest in the background makes it, and all programs that the tests start, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make` calls programs by their paths. A test that needs an activated environment must fail in an activated one, too.
os.environ["PATH"] = os.pathsep.join(
    folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != Path(sys.executable).parent
)

with contextlib.suppress(ImportError):  # hypothesis is not installed where only tests of kernels run
    from hypothesis import Phase, settings

    # On a shared machine an example may exceed the default deadline of 200 ms.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
    # For tests/mutation/: always the same examples, and no shrinking of failing ones.
    settings.register_profile("mutation", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that with two processes all other tests run in parallel with them."""
    longest = ("test_in_the_interpreter", "test_mypy", "test_commands_of_a_page", "test_one_process_learns")
    items.sort(key=lambda item: not item.name.startswith(longest))


@pytest.fixture(autouse=True)
def signal_handlers_are_kept() -> Iterator[None]:
    """A changed handler stays for all later tests of this process, and SIGPIPE at its default can end the process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, old, new in zip(numbers, before, after, strict=True):
        if new != old and old is not None:  # None: not set from Python
            signal.signal(number, old)
    assert after == before, "the test left another signal handler"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard set of `pipeline sample digits`: 1437 training and 360 validation images of 64x64 pixels."""
    folder = tmp_path_factory.mktemp("digits")
    run_pipeline("sample", "digits", folder / "images")
    run_pipeline("shard", folder / "images", "--out", folder / "set", "--shard-size", "1")
    return folder / "set"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard set of `pipeline sample photos`: 96 photos of sizes as in ImageNet, in several shards."""
    folder = tmp_path_factory.mktemp("photos")
    run_pipeline("sample", "photos", folder / "images", "--count", "96")
    run_pipeline("shard", folder / "images", "--out", folder / "set", "--shard-size", "2")
    return folder / "set"
