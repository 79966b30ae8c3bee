"""Where `pipeline shard SOURCE` writes without --out."""

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
def test_the_set_lies_beside_what_the_command_line_names(
    source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`store` is another disk: `data`, `parent` and `archive.tar` are links to what is there."""
    (tmp_path / "store" / "images").mkdir(parents=True)
    (tmp_path / "store" / "a.tar").touch()
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    (home / "train.tar").touch()
    for link, target in (("data", "store/images"), ("parent", "store"), ("archive.tar", "store/a.tar")):
        (home / link).symlink_to(tmp_path / target)
    monkeypatch.chdir(home)
    inside = source if not source.startswith("home/") else tmp_path / source
    wanted = tmp_path / expected if source != ".." else tmp_path.parent / expected.format(name=tmp_path.name)
    assert default_out(Path(inside)) == wanted


def test_the_root_folder_needs_a_name() -> None:
    with pytest.raises(UserError, match=r"/: has no name .*--out"):
        default_out(Path("/"))
