"""Use timm, torchvision and segmentation_models_pytorch in a test.

`make test` installs them into a folder of their own. If they were in the environment, transformers and accelerate would
find torchvision and import it in other tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(sys.prefix) / "vision"
NAMES = ("timm", "torchvision", "segmentation_models_pytorch")
_imported: dict[str, ModuleType] = {}


@pytest.fixture
def vision_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the libraries importable during a test."""
    require()
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.update(_imported)  # they cannot be imported twice, because operators can be registered only once
    yield
    _imported.update({name: module for name, module in sys.modules.items() if name.split(".")[0] in NAMES})
    for name in _imported:
        del sys.modules[name]


def require() -> None:
    """Skip a test if the libraries are not installed; with CI=true it fails later."""
    if os.environ.get("CI") != "true" and not FOLDER.exists():
        pytest.skip(f"{', '.join(NAMES)} are not installed in {FOLDER}; `make test-unit` installs them")
