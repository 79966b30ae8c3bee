"""A folder in which the commands of the documentation run: tiny data under the names that the pages use.

    imagenet/ (train/, val/)   imagenet-shards/   photos/ (class folders)   runs/fat/ (a finished run)
    launch/ benchmarks/ examples/ accelerate_config.yaml: links to those of the project

`accelerate`, `python` and `pipeline` are wrapped by `tiny.py`, which adds options that make a training short.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

LINKED = ("launch", "benchmarks", "examples", "accelerate_config.yaml")
Shell = Callable[[str, Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Return a function that runs bash text in a folder, with the wrapped commands first on the path."""
    wrappers = tmp_path_factory.mktemp("bin")
    for name in ("accelerate", "python", "pipeline"):
        wrapper = wrappers / name
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/docs/tiny.py {name} "$@"\n')
        wrapper.chmod(0o755)
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FAT_", "ACCELERATE_"))},
        "PATH": f"{wrappers}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "OMP_WAIT_POLICY": "PASSIVE",
        "WANDB_MODE": "offline",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }

    def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def prepared(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of which every page gets a copy."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    done = shell(
        "pipeline sample photos imagenet --count 60; pipeline shard imagenet; cp -r imagenet/train photos; "
        "python launch/train.py",
        folder,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "work"
    shutil.copytree(prepared, copy, symlinks=True)
    return copy
