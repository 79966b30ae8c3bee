"""The pages: their links, lengths and openings, and the site that `make docs` builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

MAX_LINES = 200
README_LINES = 150


# Generated pages are looked up, not read.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ("commands", "training-options")], ids=lambda page: page.stem
)
def test_pages_are_short(page: Path) -> None:
    lines = len(page.read_text().splitlines())
    assert lines < (README_LINES if page.name == "README.md" else MAX_LINES)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.stem)
def test_pages_open_with_who_needs_them(page: Path) -> None:
    title, empty, first = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert first.startswith("For "), f"{page.name}: the first sentence says for whom the page is: {first!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT], ids=lambda page: page.stem)
def test_links_outside_the_site_lead_to_files(page: Path) -> None:
    """MkDocs checks those of docs/."""
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    """In strict mode a warning, such as a broken link or anchor, is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    api = (tmp_path / "site" / "api.html").read_text()
    assert "fat.create_model" in api
    assert "pipeline.TrainLoader.set_epoch" in api, "also inherited methods"
