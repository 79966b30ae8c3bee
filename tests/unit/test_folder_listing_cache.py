"""A conversion lists each folder of its source at most twice, because walking a network file system takes minutes."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.convert.convert import convert
from shards.convert.options import Options
from shards.sources.scan import ScanOptions
from shards.sources.walk import cached_folder_listings, count_files, list_folder
from tests.support.folder_listings import count_listings
from tests.support.sources import class_folders, jpeg, labeled_tar

ONE = Options(scan=ScanOptions(workers=1))


def folders(root: Path) -> None:
    class_folders(root / "train", {f"c{i:02}": 20 for i in range(50)})
    class_folders(root / "val", {f"c{i:02}": 2 for i in range(50)})


def one_folder(root: Path) -> None:
    class_folders(root, {f"c{i:02}": 20 for i in range(50)})


def tars(root: Path) -> None:
    for i in range(4):
        labeled_tar(root / "train" / f"{i}.tar", [0, 1])
    (root / "train" / "0.tar.gz").write_bytes(b"the downloaded archive")


def class_tars(root: Path) -> None:
    unpacked = class_folders(root.parent / "unpacked", {"cat": 3, "dog": 3})
    root.mkdir()
    for folder in sorted(unpacked.iterdir()):
        with tarfile.open(root / f"{folder.name}.tar", "w") as tar:
            for image in sorted(folder.iterdir()):
                tar.add(image, image.name)
    shutil.rmtree(unpacked)


def tables(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    for split in ("train", "val"):
        images = [{"bytes": jpeg(i), "path": None} for i in range(2)]
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), root / f"{split}.parquet")


def add_unused_folders(root: Path) -> None:
    """Add folders that are not used and folders that are skipped."""
    for top in ("raw/deep", "__MACOSX"):
        for i in range(3):
            (root / top / f"{i}").mkdir(parents=True)
            (root / top / f"{i}" / "x.bin").write_bytes(b"x")


@pytest.mark.parametrize("layout", [folders, one_folder, tars, class_tars, tables])
def test_each_folder_is_listed_at_most_twice(layout: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "in"
    layout(source)
    if layout is not one_folder:
        add_unused_folders(source)
    with count_listings(source) as listings:
        assert convert(source, tmp_path / "set", ONE) is not None
    every = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_dir()} | {"."}
    assert set(listings) == every, "every folder must be listed"
    assert max(listings.values()) <= 2, listings
    with count_listings(source) as again:
        assert convert(source, tmp_path / "set", ONE) is None
    assert max(again.values()) <= 2, again


def test_listings_are_cached_only_inside_the_block(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1})
    with cached_folder_listings():
        assert (list_folder(tmp_path).folders, count_files(tmp_path)) == ([b"a"], 1)
        with cached_folder_listings():
            class_folders(tmp_path, {"b": 1})
            assert (list_folder(tmp_path).folders, count_files(tmp_path)) == ([b"a"], 1)
        assert (list_folder(tmp_path).folders, count_files(tmp_path)) == ([b"a"], 1), "the outer block keeps its cache"
    assert (list_folder(tmp_path).folders, count_files(tmp_path)) == ([b"a", b"b"], 2)
    class_folders(tmp_path, {"c": 1})
    assert (list_folder(tmp_path).folders, count_files(tmp_path)) == ([b"a", b"b", b"c"], 3)
