"""Files next to tars and Parquet files are counted, and misleading locations of archives are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main as pipeline
from shards.format.dataset import ShardSet
from shards.sources.layouts.detect import scan
from shards.sources.scan import Scan, ScanOptions
from tests.support.source_folders.images import jpeg
from tests.support.source_folders.source import put_files, put_images
from tests.support.source_folders.tars_and_parquet import parquet, samples, tar


def scan_it(source: Path) -> Scan:
    return scan(source, ScanOptions(workers=1), source.parent / "spool")


def archive(root: Path, name: str) -> None:
    if name.endswith(".parquet"):
        parquet(root, name, [0, 1])
    elif name.endswith(".tar"):
        tar(root, name, samples(name, [0, 1]))
    else:
        put_images(root, f"{name}/{{cat,dog}}/{{1,2}}.jpg")


@pytest.mark.parametrize(
    ("archives", "layout"),
    [
        (["backup.tar"], "webdataset"),
        (["cat/backup.tar"], "webdataset"),
        (["meta.parquet"], "parquet"),
        (["cat.tar", "dog.tar"], "class-tars"),
    ],
)
def test_an_archive_next_to_class_folders_causes_a_warning_that_names_the_layout(
    archives: list[str], layout: str, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    put_images(source, "{cat,dog}/{1,2}.jpg")
    for name in archives:
        if layout == "class-tars":
            tar(source, name, [("1.jpg", jpeg(1))])
        else:
            archive(source, name)
    found = scan_it(source)
    assert found.layout == layout
    more = " and 1 more" if len(archives) > 1 else ""
    assert found.warnings[0] == (
        f"{source}: read as layout {layout} because of {source}/{archives[0]}{more}, so 4 image files (such as "
        "cat/1.jpg) are not used; to convert class folders instead, use --from folder"
    )
    instead = scan(source, ScanOptions(workers=1, layout="folder"), tmp_path / "spool")
    assert [entry.folder for entry in instead.classes] == ["cat", "dog"]
    assert len(instead.splits["train"]) == 4


@pytest.mark.parametrize(
    ("made", "source", "named", "split"),
    [
        ("test/0000.tar", "test/0000.tar", "is in a folder named test", "test"),
        ("val/0000.tar", "val/0000.tar", "is in a folder named val", "val"),
        ("Test_Set/0000.parquet", "Test_Set/0000.parquet", "is in a folder named Test_Set", "test"),
        ("test/0000.tar", "test", "is a folder named test", "test"),
        ("validation/0000.parquet", "validation", "is a folder named validation", "val"),
        ("test", "test", "is a folder named test", "test"),
        ("imagenet_val", "imagenet_val", "is a folder named imagenet_val", "val"),
        ("val2017", "val2017", "is a folder named val2017", "val"),
        ("evaluation", "evaluation", "is a folder named evaluation", "val"),
        ("tests", "", "is a folder named tests", "test"),
        ("tests/0000.tar", "tests", "is a folder named tests", "test"),
    ],
)
def test_a_source_in_a_folder_named_like_a_split_causes_a_warning(
    made: str, source: str, named: str, split: str, tmp_path: Path
) -> None:
    """Only names below the source determine the split."""
    archive(tmp_path / "in", made)
    found = scan_it(tmp_path / "in" / source)
    assert list(found.splits) == ["train"]
    (warning,) = found.warnings
    assert f"its images are used for split 'train', although it {named}; to use them for split '{split}'" in warning
    if "renamed to" in warning:
        folder = tmp_path / "in" / made.split("/", maxsplit=1)[0]
        folder.rename(folder.with_name(split))
    followed = scan_it(tmp_path / "in")
    assert (list(followed.splits), followed.warnings) == ([split], ())


@pytest.mark.parametrize(
    "made", ["train/0000.tar", "training", "testimonials", "test_project", "valley/0000.tar", "pets"]
)
def test_a_source_in_a_folder_of_another_name_causes_no_warning(made: str, tmp_path: Path) -> None:
    archive(tmp_path / "in", made)
    assert scan_it(tmp_path / "in" / made).warnings == ()


def test_the_split_in_a_file_name_overrides_its_folder(tmp_path: Path) -> None:
    archive(tmp_path / "in", "test/train-0.tar")
    archive(tmp_path / "in", "data-test.parquet")
    for source, split in (("test/train-0.tar", "train"), ("data-test.parquet", "test")):
        found = scan_it(tmp_path / "in" / source)
        assert (list(found.splits), found.warnings) == ([split], ())


@pytest.mark.parametrize("name", ["evaluation-0.tar", "tests/0000.tar", "pets_validate.parquet"])
def test_archives_with_names_similar_to_splits_cause_a_warning(name: str, tmp_path: Path) -> None:
    archive(tmp_path / "in", name)
    (warning,) = scan_it(tmp_path / "in").warnings
    assert f"no split in the name, so used for training, although {name} resembles split '" in warning


@pytest.mark.parametrize("form", ["tar", "both"])
def test_metadata_of_a_shard_set_that_is_converted_again_causes_no_note(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(tmp_path / "in", "{train/{cat,dog}/{1,2},val/{cat,dog}/3}.jpg")
    put_files(tmp_path / "in", "train/cat/4.jpg", "no image")
    first = tmp_path / "first"
    options = ["--workers", "1", "--max-rejects", "0.5"]
    assert pipeline(["shard", f"{tmp_path / 'in'}", "--out", f"{first}", "--format", form, *options]) == 0
    put_files(first, "{notes.txt,other.idx}", "x")
    capsys.readouterr()
    assert pipeline(["shard", f"{first}", "--out", f"{tmp_path / 'second'}", *options]) == 0
    unused = ShardSet(tmp_path / "second").manifest.made["unused"]
    twice = form == "both"
    assert {(entry["kind"], entry["reason"]): entry["count"] for entry in unused} == {
        (".idx", "index of a tar"): 2,
        (".npy", "metadata of the shard set that is read"): 4 if twice else 2,
        **({(".beton", "metadata of the shard set that is read"): 2} if twice else {}),
        (".json", "metadata of the shard set that is read"): 1,
        (".jsonl", "metadata of the shard set that is read"): 1,
        (".txt", "not an archive that is read"): 1,
        (".idx", "not an archive that is read"): 1,
    }
    message = capsys.readouterr().out
    assert "not used: 2 .idx: index of a tar (such as train-000000.idx)" in message
    assert "note:" not in message


def test_indexes_of_dali_are_counted_as_indexes_of_their_tars(tmp_path: Path) -> None:
    for name in ("pets-0", "more/pets-1"):
        archive(tmp_path / "in", f"{name}.tar")
        put_files(tmp_path / "in", f"{name}.idx", "v1.2 2\n")
    unused = scan_it(tmp_path / "in").unused
    assert [(entry.reason, entry.count) for entry in unused] == [("index of a tar", 2)]
