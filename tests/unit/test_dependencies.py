"""The pinned versions (constraints.txt) can be installed with every version of Python that pyproject.toml allows."""

from __future__ import annotations

import tomllib
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.support.launching import ROOT


def test_pinned_versions_support_the_oldest_python() -> None:
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = Version(supported.removeprefix(">="))
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in pins if not line.startswith("#"))
    required = {name: _requires_python(name) for name in pinned}
    assert required["torch"] is not None
    assert {name: needed for name, needed in required.items() if needed and oldest not in SpecifierSet(needed)} == {}


def _requires_python(name: str) -> str | None:
    """Return the versions of Python that an installed package supports; None: all, or it is not installed."""
    try:
        return metadata.metadata(name).get("Requires-Python")
    except metadata.PackageNotFoundError:
        return None
