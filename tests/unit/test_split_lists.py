"""Lists that divide the images into splits are not read, and that is said where the source is not divided so."""

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
from tests.support.source_folders.source import pictures, put
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
def test_a_list_names_its_splits(name: str, splits: str) -> None:
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
        # Food-101, CUB-200, Stanford Dogs and DTD, whose folder of class folders is given
        (f"images/{CLASSES}", "meta/{train,test}.json", "images", "test"),
        (f"images/{CLASSES}", "train_test_split.txt", "images", "test"),
        (f"Images/{CLASSES}", "lists/{train,test}_list.mat", "Images", "test"),
        (f"images/{CLASSES}", "labels/{train,val,test}1.txt", "images", "test or val"),
    ],
)
def test_lists_of_splits_near_class_folders_are_doubted(
    images: str, lists: str, source: str, named: str, tmp_path: Path
) -> None:
    pictures(tmp_path / "in", images)
    put(tmp_path / "in", lists, "cat/1.jpg\n")
    found = scan(tmp_path / "in" / source, ScanOptions(), tmp_path / "spool")
    warning = next(warning for warning in found.warnings if "of splits" in warning)
    assert f"{named} images may be among the train images; divide" in warning
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
        (CLASSES, "../{train,test}.txt"),  # beside a source that is not named images
        (CLASSES, "cat/test.txt"),  # of the class's own
        (f"{{train,val}}/{CLASSES}", "{test,splits}.txt"),  # divided, whatever else there may be lists of
        (f"images/{{train,val}}/{CLASSES}", "meta/{train,val,test}.txt"),
    ],
)
def test_lists_that_say_no_more_than_the_folders_are_no_doubt(images: str, lists: str, tmp_path: Path) -> None:
    pictures(tmp_path / "in", images)
    put(tmp_path / "in", lists, "cat/1.jpg\n")
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert not any("of splits" in warning for warning in found.warnings)


def test_a_list_of_a_split_that_is_not_used_is_no_doubt(tmp_path: Path) -> None:
    """As Kaggle's test/, which has no labels."""
    pictures(tmp_path / "in", f"train/{CLASSES}")
    pictures(tmp_path / "in", "test/{1,2}.jpg")
    put(tmp_path / "in", "test.csv", "1.jpg\n")
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert not any("of splits" in warning for warning in found.warnings)


def test_a_folder_beside_that_cannot_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "in", f"{{train,val}}/{CLASSES}")
    put(tmp_path / "in", "notes/private/test.txt", "cat/1.jpg\n")

    def list_folder(folder: Path) -> walk.FolderContents:
        if folder.name == "private":
            raise PermissionError(13, "Permission denied", f"{folder}")
        return walk.list_folder(folder)

    monkeypatch.setattr(split_lists, "list_folder", list_folder)
    assert lists_below(tmp_path / "in") == []


def test_a_folder_that_holds_itself_is_looked_at_once(tmp_path: Path) -> None:
    put(tmp_path, "test.txt", "cat/1.jpg\n")
    (tmp_path / "again").symlink_to(".")
    assert lists_below(tmp_path) == [tmp_path / "test.txt"]


def test_a_folder_of_lists_among_classes_is_refused_with_what_it_is(tmp_path: Path) -> None:
    pictures(tmp_path / "in", CLASSES)
    put(tmp_path / "in", "meta/{train,test}.txt", "cat/1.jpg\n")
    lists = rf"it holds lists of splits \({tmp_path}/in/meta/test.txt, {tmp_path}/in/meta/train.txt\): make train/ and"
    with pytest.raises(UserError, match=lists):
        scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")


@pytest.mark.parametrize("kind", ["webdataset", "class-tars", "parquet"])
def test_lists_of_splits_beside_archives_are_doubted(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    if kind == "webdataset":
        tar(source, "pets-0.tar", samples("pets", [0, 1]))
    elif kind == "class-tars":
        for name in ("cat", "dog"):
            tar(source, f"{name}.tar", [(f"{i}.jpg", dict(samples(name, [0, 1]))[f"000{i}.jpg"]) for i in (0, 1)])
    else:
        parquet(source, "pets.parquet", [0, 1])
    put(source, "{train,test}.txt", "0\n")
    found = scan(source, ScanOptions(workers=1), tmp_path / "spool")
    assert found.layout == kind
    assert [warning.split(" looks like")[0] for warning in found.warnings] == [f"{source}/test.txt:"]


def test_lists_end_in_the_summary_and_strict_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "in", CLASSES)
    put(tmp_path / "in", "{train,test}.txt", "cat/1.jpg\n")
    command = ["shard", f"{tmp_path / 'in'}", "--out", f"{tmp_path / 'set'}", "--workers", "1"]
    assert pipeline([*command, "--strict"]) == 2
    assert "--strict: test.txt: looks like a list of splits" in capsys.readouterr().err.replace(f"{tmp_path}/in/", "")
    assert pipeline(command) == 0
    assert pipeline([*command, "--strict"]) == 2, "of a finished set too"
    assert pipeline(command) == 0
    assert "note: test.txt: looks like a list of splits, which is not read" in capsys.readouterr().out
