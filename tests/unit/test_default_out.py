"""The default output folder of `pipeline shard SOURCE`."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.convert.convert import default_out
from shards.errors import UserError


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("home/images", "home/images-shards"),
        ("home/images/", "home/images-shards"),
        ("home/data", "home/data-shards"),
        ("home/parent/images", "home/parent/images-shards"),
        ("home/train.tar", "home/train-shards"),
        ("home/archive.tar", "home/archive-shards"),
        (".", "home-shards"),
        ("images/..", "home-shards"),
        ("..", "{name}-shards"),
        ("data", "home/data-shards"),
    ],
)
def test_the_default_folder_is_next_to_the_source(
    source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data`, `parent` and `archive.tar` are symbolic links into `store`, which stands for another disk."""
    (tmp_path / "store" / "images").mkdir(parents=True)
    (tmp_path / "store" / "a.tar").touch()
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    (home / "train.tar").touch()
    for link, target in (("data", "store/images"), ("parent", "store"), ("archive.tar", "store/a.tar")):
        (home / link).symlink_to(tmp_path / target)
    monkeypatch.chdir(home)
    inside = source if not source.startswith("home/") else tmp_path / source
    expected_path = tmp_path / expected if source != ".." else tmp_path.parent / expected.format(name=tmp_path.name)
    assert default_out(Path(inside)) == expected_path


def test_the_root_folder_has_no_default() -> None:
    with pytest.raises(UserError, match=r"/: no default name .*--out"):
        default_out(Path("/"))
