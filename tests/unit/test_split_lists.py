"""Split lists are not read; a warning is given if the source lacks the splits that they list."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main as pipeline
from shards.errors import UserError
from shards.sources import walk
from shards.sources.layouts.detect import scan
from shards.sources.naming import split_lists
from shards.sources.naming.split_lists import lists_below, splits_of_list
from shards.sources.scan import ScanOptions
from tests.support.source_folders.source import put_files, put_images
from tests.support.source_folders.tars_and_parquet import parquet, samples, tar

CLASSES = "{cat,dog}/{1,2}.jpg"


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train.txt", "train"),
        ("Test.CSV", "test"),
        ("val_list.mat", "val"),
        ("train_test_split.txt", "test train"),
        ("test1.txt", "test"),
        ("validate1.txt", "val"),
        ("list_eval_partition.txt", "val"),
        ("tests.json", "test"),
        ("splits.json", "test train val"),
        ("setid.mat", "test train val"),
        ("folds.csv", "test train val"),
        ("split_zhou_Caltech101.json", "test train val"),
        ("classes.txt", ""),
        ("labels.csv", ""),
        ("README.txt", ""),
        ("test.py", ""),
        ("test.jpg", ""),
        ("train.ipynb", ""),
        ("test_results.json", ""),
        ("requirements-dev.txt", ""),
        ("train_log.txt", ""),
        ("testimonials.txt", ""),
        ("valley.csv", ""),
    ],
)
def test_the_splits_of_a_list_follow_from_its_name(name: str, splits: str) -> None:
    assert splits_of_list(name) == set(splits.split())


@pytest.mark.parametrize(
    ("images", "lists", "source", "named"),
    [
        (CLASSES, "{train,test}.txt", "", "test"),
        (CLASSES, "{train,val}.csv", "", "val"),
        (CLASSES, "train_test_split.txt", "", "test"),
        (CLASSES, "splits.json", "", "test or val"),
        (f"pets/{CLASSES}", "{trainval,test}.txt", "", "test"),
        (f"pets/{CLASSES}", "pets/test.lst", "", "test"),
        # Food-101, CUB-200, Stanford Dogs, and DTD, if their images/ folder is converted
        (f"images/{CLASSES}", "meta/{train,test}.json", "images", "test"),
        (f"images/{CLASSES}", "train_test_split.txt", "images", "test"),
        (f"Images/{CLASSES}", "lists/{train,test}_list.mat", "Images", "test"),
        (f"images/{CLASSES}", "labels/{train,val,test}1.txt", "images", "test or val"),
    ],
)
def test_split_lists_near_class_folders_cause_a_warning(
    images: str, lists: str, source: str, named: str, tmp_path: Path
) -> None:
    put_images(tmp_path / "in", images)
    put_files(tmp_path / "in", lists, "cat/1.jpg\n")
    found = scan(tmp_path / "in" / source, ScanOptions(), tmp_path / "spool")
    warning = next(warning for warning in found.warnings if "split list" in warning)
    assert f"{named} images may be among the train images; move the images into train/ and test/" in warning
    for path in tmp_path.rglob("*.*"):
        assert (f"{path}" in warning) == bool(splits_of_list(path.name) - {"train"}), warning


@pytest.mark.parametrize(
    ("images", "lists"),
    [
        (CLASSES, "train.txt"),
        (CLASSES, "{classes,labels}.txt"),
        (f"{{train,val}}/{CLASSES}", "{train,val}.txt"),
        (f"{{train,test}}/{CLASSES}", "meta/train_test_split.txt"),
        (f"images/{{train,test}}/{CLASSES}", "meta/train_test_split.txt"),
        (CLASSES, "../{train,test}.txt"),  # outside a source that is not named images
        (CLASSES, "cat/test.txt"),  # in a class folder
        (f"{{train,val}}/{CLASSES}", "{test,splits}.txt"),  # the source already has several splits
        (f"images/{{train,val}}/{CLASSES}", "meta/{train,val,test}.txt"),
    ],
)
def test_split_lists_cause_no_warning_if_the_source_has_splits(images: str, lists: str, tmp_path: Path) -> None:
    put_images(tmp_path / "in", images)
    put_files(tmp_path / "in", lists, "cat/1.jpg\n")
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert not any("split list" in warning for warning in found.warnings)


def test_a_list_of_an_unused_split_causes_no_warning(tmp_path: Path) -> None:
    """Example: Kaggle's test/, which has no labels."""
    put_images(tmp_path / "in", f"train/{CLASSES}")
    put_images(tmp_path / "in", "test/{1,2}.jpg")
    put_files(tmp_path / "in", "test.csv", "1.jpg\n")
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert not any("split list" in warning for warning in found.warnings)


def test_unreadable_folders_are_ignored_when_searching_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path / "in", f"{{train,val}}/{CLASSES}")
    put_files(tmp_path / "in", "notes/private/test.txt", "cat/1.jpg\n")

    def list_folder(folder: Path) -> walk.FolderContents:
        if folder.name == "private":
            raise PermissionError(13, "Permission denied", f"{folder}")
        return walk.list_folder(folder)

    monkeypatch.setattr(split_lists, "list_folder", list_folder)
    assert lists_below(tmp_path / "in") == []


def test_a_link_to_the_folder_itself_is_not_followed_twice(tmp_path: Path) -> None:
    put_files(tmp_path, "test.txt", "cat/1.jpg\n")
    (tmp_path / "again").symlink_to(".")
    assert lists_below(tmp_path) == [tmp_path / "test.txt"]


def test_a_folder_of_split_lists_among_classes_is_rejected_with_a_remedy(tmp_path: Path) -> None:
    put_images(tmp_path / "in", CLASSES)
    put_files(tmp_path / "in", "meta/{train,test}.txt", "cat/1.jpg\n")
    lists = rf"it contains split lists \({tmp_path}/in/meta/test.txt, {tmp_path}/in/meta/train.txt\): sort the images"
    with pytest.raises(UserError, match=lists):
        scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")


@pytest.mark.parametrize("kind", ["webdataset", "class-tars", "parquet"])
def test_split_lists_next_to_archives_cause_a_warning(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    if kind == "webdataset":
        tar(source, "pets-0.tar", samples("pets", [0, 1]))
    elif kind == "class-tars":
        for name in ("cat", "dog"):
            tar(source, f"{name}.tar", [(f"{i}.jpg", dict(samples(name, [0, 1]))[f"000{i}.jpg"]) for i in (0, 1)])
    else:
        parquet(source, "pets.parquet", [0, 1])
    put_files(source, "{train,test}.txt", "0\n")
    found = scan(source, ScanOptions(workers=1), tmp_path / "spool")
    assert found.layout == kind
    assert [warning.split(" looks like")[0] for warning in found.warnings] == [f"{source}/test.txt:"]


def test_split_lists_are_in_the_summary_and_rejected_by_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(tmp_path / "in", CLASSES)
    put_files(tmp_path / "in", "{train,test}.txt", "cat/1.jpg\n")
    command = ["shard", f"{tmp_path / 'in'}", "--out", f"{tmp_path / 'set'}", "--workers", "1"]
    assert pipeline([*command, "--strict"]) == 2
    assert "--strict: test.txt: looks like a split list" in capsys.readouterr().err.replace(f"{tmp_path}/in/", "")
    assert pipeline(command) == 0
    assert pipeline([*command, "--strict"]) == 2, "also for a complete shard set"
    assert pipeline(command) == 0
    assert "warning: test.txt: looks like a split list, which is not read" in capsys.readouterr().out
