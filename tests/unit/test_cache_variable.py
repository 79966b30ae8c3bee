"""FAT_CACHE is the default of `--cache` for every command that reads a remote set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main as pipeline
from launch.evaluate import main as evaluate
from launch.train import main as train
from tests.support.cached import cached
from tests.support.commands import SMALL, run
from tests.support.serving import serve

COMMANDS: dict[str, tuple[Callable[[], int], tuple[str, ...]]] = {
    "train": (train, (*SMALL, "--dry-run", "--out", "run", "--data", "URL")),
    "evaluate": (evaluate, ("no-such-weights-last.safetensors", "--data", "URL")),  # the set is opened before the model
    "look": (pipeline, ("look", "URL", "--size", "32", "--count", "4", "--out", "look.png")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_fat_cache_is_used_unless_the_option_is_given(
    command: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, args = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAT_CACHE", "named")
    with serve(digits) as site:
        url = [site.url if arg == "URL" else arg for arg in args]
        run(main, *url)
        assert cached(tmp_path / "named", "dataset.json")
        run(main, *url, "--cache", "given")
        assert cached(tmp_path / "given", "dataset.json")
