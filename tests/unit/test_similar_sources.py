"""Sources that resemble another layout, another source, or another split are not confused with it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.sources.layouts.detect import scan
from shards.sources.scan import ScanOptions
from tests.support.sources import jpeg

ONE = ScanOptions(workers=1)


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))


def test_tars_with_all_images_before_all_labels_are_not_read_as_class_tars(tmp_path: Path) -> None:
    """The first members, which are inspected to detect the layout, are images only."""
    for part in range(2):
        images = [(f"{i:03d}.jpg", jpeg(i)) for i in range(70)]
        tar(tmp_path / f"part{part}.tar", [*images, *((f"{i:03d}.cls", b"%d" % (i % 5)) for i in range(70))])
    with pytest.raises(UserError, match=r"part0\.tar: contains a label .*use --from webdataset"):
        scan(tmp_path, ONE, tmp_path / "spool")
    found = scan(tmp_path, ScanOptions(layout="webdataset", workers=1), tmp_path / "spool")
    assert len(found.classes) == 5


def test_tars_of_class_folders_are_not_read_as_class_tars(tmp_path: Path) -> None:
    for number in range(2):
        tar(tmp_path / f"batch{number}.tar", [(f"{name}/{number}.jpg", jpeg(number)) for name in ("cat", "dog")])
    with pytest.raises(UserError, match=r"batch0\.tar: contains 2 folders .*tar xf"):
        scan(tmp_path, ONE, tmp_path / "spool")


@pytest.mark.parametrize("names", [("00001", "00002"), ("part0", "part1"), ("shard-1", "shard-2")])
def test_class_tars_named_like_shards_cause_a_warning(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        tar(tmp_path / f"{name}.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    found = scan(tmp_path, ONE, tmp_path / "spool")
    assert any("named like numbered shards" in warning for warning in found.warnings)


def bitmaps(root: Path, shade: int) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (32, 32), shade + i).save(root / name / f"{i}.bmp")
    return root


def test_sources_with_images_of_equal_sizes_are_distinguished_by_content(tmp_path: Path) -> None:
    """Uncompressed images of the same shape have equal sizes: MNIST and KMNIST as bitmaps."""
    convert(bitmaps(tmp_path / "one", 40), tmp_path / "set", Options(scan=ONE))
    with pytest.raises(UserError, match="converted from a different source"):
        convert(bitmaps(tmp_path / "two", 90), tmp_path / "set", Options(scan=ONE))
    assert convert(bitmaps(tmp_path / "copy", 40), tmp_path / "set", Options(scan=ONE)) is None


def test_a_changed_label_in_a_tar_makes_it_another_source(tmp_path: Path) -> None:
    samples = [
        (f"{i:02d}.{suffix}", data) for i in range(40) for suffix, data in (("jpg", jpeg(i)), ("cls", b"%d" % (i % 4)))
    ]
    tar(tmp_path / "in" / "a.tar", samples)
    convert(tmp_path / "in", tmp_path / "set", Options(scan=ONE))
    assert convert(tmp_path / "in", tmp_path / "set", Options(scan=ONE)) is None
    tar(tmp_path / "in" / "a.tar", [samples[0], (samples[1][0], b"3"), *samples[2:]])
    with pytest.raises(UserError, match="converted from a different source"):
        convert(tmp_path / "in", tmp_path / "set", Options(scan=ONE))


def test_class_names_that_contain_a_split_are_rejected_as_ambiguous(tmp_path: Path) -> None:
    for name in ("bullet_train", "test_tube"):
        for sub in "ab":
            (tmp_path / name / sub).mkdir(parents=True)
            (tmp_path / name / sub / "x.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match="bullet_train: contains folders, so it may be a class or the train split"):
        scan(tmp_path, ONE, tmp_path / "spool")


def test_images_next_to_a_tar_cause_a_warning(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(jpeg(1))
    tar(tmp_path / "backup.tar", [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1)), ("1.cls", b"1")])
    found = scan(tmp_path, ONE, tmp_path / "spool")
    (warning,) = found.warnings
    assert "read as layout webdataset because of" in warning
    assert "2 image files (such as a/x.jpg) are not used; to convert class folders" in warning
    assert "--from folder" in warning
