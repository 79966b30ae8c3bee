"""Every split of a source is used according to its name, and unused files are reported."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.commands.index_tars import index_tars
from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.sources.layouts.detect import detect_layout, scan
from shards.sources.layouts.folder import scan_folder
from shards.sources.naming.classes import imagenet_notes
from shards.sources.scan import Scan, ScanOptions
from tests.support.users import NOBODY, as_user, needs_root, public_folder

ONE = ScanOptions(workers=1)
CLASSES = ("cat", "dog")


def jpeg(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


JPEG = jpeg()


def write(path: Path, data: bytes = JPEG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tree(root: Path, *folders: str, classes: Iterable[str] = CLASSES, each: int = 2) -> Path:
    """Write class folders into each of the folders."""
    for folder in folders:
        for name in classes:
            for i in range(each):
                write(root / folder / name / f"{i}.jpg")
    return root


def flat(root: Path, *folders: str) -> Path:
    for folder in folders:
        write(root / folder / "0.jpg")
        write(root / folder / "1.jpg")
    return root


def tar(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for number, name in enumerate(names):
            data = JPEG if name.lower().endswith((".jpg", ".jpeg")) else b"%d" % (number // 2 % 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def samples_tar(path: Path, count: int) -> None:
    tar(path, *(f"{i}.{suffix}" for i in range(count) for suffix in ("jpg", "cls")))


def counts(found: Scan) -> dict[str, int]:
    return {split: len(listing) for split, listing in found.splits.items()}


def classes(found: Scan) -> list[str]:
    return [entry.folder for entry in found.classes]


def unused_counts(found: Scan) -> dict[tuple[str, str], int]:
    return {(entry.reason, entry.kind): entry.count for entry in found.unused}


USED = {
    "train and val": (("train", "val"), {"train": 4, "val": 4}),
    "all three": (("train", "val", "test"), {"train": 4, "val": 4, "test": 4}),
    "only test and train": (("train", "test"), {"train": 4, "test": 4}),
    "full words": (("training", "validation", "testing"), {"train": 4, "val": 4, "test": 4}),
    "upper case": (("TRAIN", "VAL"), {"train": 4, "val": 4}),
    "with _set": (("train_set", "val_set"), {"train": 4, "val": 4}),
    "camel case": (("TrainSet", "TestSet"), {"train": 4, "test": 4}),
    "years": (("train2017", "val2017"), {"train": 4, "val": 4}),
    "dev": (("train", "dev"), {"train": 4, "val": 4}),
    "holdout": (("train", "holdout"), {"train": 4, "val": 4}),
    "with the name of the data set": (("pets_train", "pets_test"), {"train": 4, "test": 4}),
    "only validation": (("val",), {"val": 4}),
    "wrapper": (("pets/train", "pets/val"), {"train": 4, "val": 4}),
    "two wrappers": (("pets/pets/train", "pets/pets/val"), {"train": 4, "val": 4}),
    "wrapper named as a split": (("test/train", "test/val"), {"train": 4, "val": 4}),
    "nested split folders": (("train/train", "val/val"), {"train": 4, "val": 4}),
    "wrapper without splits": (("pets",), {"train": 4}),
    "no split": ((".",), {"train": 4}),
}


@pytest.mark.parametrize("name", USED)
def test_split_folders_are_used_as_splits_not_as_classes(name: str, tmp_path: Path) -> None:
    folders, expected = USED[name]
    source = tree(tmp_path / "in", *folders)
    assert detect_layout(source) == "folder"
    found = scan(source, ONE, tmp_path / "spool")
    assert counts(found) == expected
    assert classes(found) == list(CLASSES)
    assert found.warnings == ()


@pytest.mark.parametrize("name", ["wrapper", "two wrappers", "nested split folders", "wrapper without splits"])
def test_wrapper_folders_are_noted(name: str, tmp_path: Path) -> None:
    folders, _ = USED[name]
    source = tree(tmp_path / "in", *folders)
    assert f"{source / folders[0].split('/')[0]}" in " ".join(scan(source, ONE, tmp_path / "spool").notes)


def test_folders_without_images_next_to_a_wrapper_are_not_used(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "images/train", "images/val")
    write(source / "annotations" / "train.json", b"{}")
    found = scan(source, ONE, tmp_path / "spool")
    assert counts(found) == {"train": 4, "val": 4}
    assert ("folder not used", "annotations") in unused_counts(found)


REJECTED = {
    "test and val without train": (lambda r: tree(r, "test", "val"), "only the splits val, test, but no split 'train'"),
    "two validation folders": (lambda r: tree(r, "train", "val", "valid"), r"2 folders for split 'val' \(val, valid\)"),
    "names that differ in case": (lambda r: tree(r, "train", "Train"), r"2 folders for split 'train' \(Train, train\)"),
    "parts of a split": (lambda r: tree(r, "trainA", "trainB"), r"2 folders for split 'train' \(trainA, trainB\)"),
    "class folders next to val": (lambda r: tree(tree(r, "val"), "."), "cat: a class folder next to split folders"),
    "class folders next to test": (lambda r: tree(tree(r, "test"), "."), "cat: a class folder next to split folders"),
    "only images in val": (lambda r: flat(tree(r, "train"), "val"), "val: no class folders in it"),
    "only images in splits": (lambda r: flat(r, "train", "val"), "train: no class folders in it"),
    "only images in test": (lambda r: flat(tree(r, "."), "test"), "test: named like split 'test', but"),
    "splits in classes": (lambda r: tree(r, "a", "b", classes=("train", "test")), "a: contains a split folder test"),
    "a split in a split": (
        lambda r: tree(tree(r, "train", "test"), "train/val"),
        "train/val: a split folder inside split",
    ),
    "class or split": (lambda r: tree(tree(r, "bullet_train"), "car"), "bullet_train: contains folders, so it may be"),
    "unlabeled train of train": (lambda r: flat(r, "train/train"), "train/train: no class folders in it"),
    "empty class": (lambda r: [tree(r, "."), (r / "cow").mkdir()], "cow: the class folder has no images; add images"),
    "empty classes": (lambda r: [tree(r, "."), *((r / c).mkdir() for c in "xyz")], r"has no images \(and 2 more\)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_ambiguous_folders_are_rejected_by_name(name: str, tmp_path: Path) -> None:
    make, message = REJECTED[name]
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert caught.value.exit_code == 2


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    """CIFAR-100 has a class 'train', and Places365 has a class 'train_station'."""
    things = ("bus", "test_tube", "train", "train_station", "valley")
    source = tree(tmp_path / "in", "train", "test", classes=things)
    found = scan(source, ONE, tmp_path / "spool")
    assert (counts(found), classes(found), found.warnings) == ({"train": 10, "test": 10}, list(things), ())
    found = scan(tree(tmp_path / "loose", ".", classes=things), ONE, tmp_path / "spool")
    assert (counts(found), classes(found)) == ({"train": 10}, list(things))
    warned = [line.split(":")[0].rpartition("/")[2] for line in found.warnings]
    assert warned == ["test_tube", "train", "train_station"]


def test_folders_in_a_class_folder_named_like_another_split_cause_a_warning(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train")
    write(source / "train" / "cat" / "val_gradient" / "0.jpg")
    write(source / "train" / "dog" / "train" / "0.jpg")
    found = scan(source, ONE, tmp_path / "spool")
    assert counts(found) == {"train": 6}
    folder = source / "train" / "cat" / "val_gradient"
    assert found.warnings == (f"{folder}: train images (1) in a folder named like another split",)
    write(source / "train" / "dog" / "test" / "0.jpg")
    (warning,) = scan(source, ONE, tmp_path / "spool").warnings
    assert warning.endswith("in a folder named like another split and 1 more")


def test_class_folders_next_to_split_folders_are_reported_as_unused(tmp_path: Path) -> None:
    source = tree(tree(tmp_path / "in", "train", "val"), ".", classes=("cow",))
    found = scan(source, ONE, tmp_path / "spool")
    assert classes(found) == list(CLASSES)
    assert unused_counts(found) == {("folder not used", "cow"): 2}
    assert found.warnings == (f"{source}: folders not used: cow",)


@pytest.mark.parametrize("folder", ["", "train"])
def test_images_outside_class_folders_are_counted_and_reported(folder: str, tmp_path: Path) -> None:
    source = flat(tree(tmp_path / "in", "train"), folder)
    found = scan(source, ONE, tmp_path / "spool")
    assert counts(found) == {"train": 4}
    assert unused_counts(found) == {("image outside any class folder", ".jpg"): 2}
    assert "2 images outside any class folder are not used (such as 0.jpg)" in found.warnings[0]


@pytest.mark.parametrize("folder", ["test", "test/test", "test/unknown"])
def test_test_images_without_labels_are_reported_as_unused(folder: str, tmp_path: Path) -> None:
    source = flat(tree(tmp_path / "in", "train", "val"), folder)
    found = scan(source, ONE, tmp_path / "spool")
    assert counts(found) == {"train": 4, "val": 4}
    assert classes(found) == list(CLASSES)
    assert [entry.reason for entry in found.unused] == ["test images without labels"]
    assert "test" in found.warnings[0]
    assert "have no labels" in found.warnings[0]


METADATA = (
    *("__MACOSX", "@eaDir", ".AppleDouble", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".Trash-1000"),
    *(".ipynb_checkpoints", "#recycle", "@Recycle", ".@__thumb", "found.000", ".git"),
)


def test_metadata_of_other_programs_is_counted_and_not_read_as_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", ".")
    for name in METADATA:
        write(source / name / "thumbnail.jpg")
        write(source / "cat" / name / "thumbnail.jpg")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._0.jpg"):
        write(source / "dog" / name)
    write(source / ".hidden" / "0.jpg")
    write(source / "cat" / ".0.jpg.partial")
    found = scan(source, ONE, tmp_path / "spool")
    assert classes(found) == list(CLASSES)
    assert counts(found) == {"train": 4}
    reasons = unused_counts(found)
    for name in METADATA:
        assert reasons["metadata of a file manager, NAS system, version control, or archive", name] == 2
    assert sum(count for (reason, _), count in reasons.items() if reason == "hidden") == 2
    assert sum(reasons.values()) == 2 * len(METADATA) + 4 + 2


def test_unused_files_are_counted_by_reason(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train")
    write(source / "readme.md", b"x")
    write(source / "train" / "list.csv", b"x")
    write(source / "train" / "cat" / "notes.txt", b"x")
    os.mkfifo(source / "train" / "dog" / "pipe")
    (source / "train" / "dog" / "up").symlink_to(source / "train")
    assert unused_counts(scan(source, ONE, tmp_path / "spool")) == {
        ("not an image", ".md"): 1,
        ("not an image", ".csv"): 1,
        ("not an image", ".txt"): 1,
        ("a fifo", "no suffix"): 1,
        ("link to a parent folder", "link"): 1,
    }


def test_unreadable_folders_are_skipped_only_if_they_are_metadata() -> None:
    needs_root()
    with public_folder() as root:
        source = tree(root / "in", ".")
        (source / "lost+found").mkdir(mode=0o700)
        found = as_user(NOBODY, lambda: unused_counts(scan_folder(source)))
        assert [kind for _, kind in found] == ["lost+found"]
        write(source / "cow" / "0.jpg")
        (source / "cow").chmod(0o700)
        error = as_user(NOBODY, lambda: convert(source, root / "set", Options(scan=ONE)))
        assert isinstance(error, UserError)
        assert f"{source / 'cow'}: Permission denied" in str(error)


def test_shard_sets_below_a_source_are_not_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "pets")
    assert convert(source, source / "first", Options(scan=ONE)) is not None
    assert convert(source, source / "second", Options(scan=ONE)) is not None
    shard_set = ShardSet(source / "second")
    assert [entry.folder for entry in shard_set.manifest.classes] == list(CLASSES)
    assert "first" in {entry["kind"] for entry in shard_set.manifest.made["unused"]}


def test_unused_folders_of_imagenet21k_winter21_are_reported(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "imagenet21k_train", "imagenet21k_val")
    tree(source, "imagenet21k_small_classes", classes=("cow",))
    found = scan(source, ONE, tmp_path / "spool")
    assert (counts(found), classes(found)) == ({"train": 4, "val": 4}, list(CLASSES))
    assert found.warnings == (f"{source}: folders not used: imagenet21k_small_classes",)


@pytest.mark.parametrize("form", ["tar", "ffcv", "both"])
def test_a_test_split_is_kept_in_every_format(form: str, tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train", "val", "test")
    assert convert(source, tmp_path / "set", Options(scan=ONE, format=form)) is not None  # type: ignore[arg-type]
    shard_set = ShardSet(tmp_path / "set")
    assert {split: entry.samples for split, entry in shard_set.manifest.splits.items()} == {
        "train": 4,
        "val": 4,
        "test": 4,
    }
    names = {"test-000000.tar": form != "ffcv", "test.beton": form != "tar", "test.index.npy": True}
    assert {name: (tmp_path / "set" / name).exists() for name in names} == names
    assert verify(tmp_path / "set", workers=1) == []


def test_val_fraction_does_not_change_the_test_split(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train", "test")
    found = scan(source, ScanOptions(val_fraction=0.5), tmp_path / "spool")
    assert counts(found) == {"train": 2, "val": 2, "test": 4}
    with pytest.raises(UserError, match="no split 'train'"):
        scan(tree(tmp_path / "alone", "test"), ScanOptions(val_fraction=0.5), tmp_path / "spool")


def test_imagenet_notes_ignore_the_test_split(tmp_path: Path) -> None:
    found = scan(tree(tmp_path / "in", "train", "test", classes=("n00000000",)), ONE, tmp_path / "spool")
    assert imagenet_notes(replace(found, layout="ilsvrc")) == (
        "ImageNet-1K has 1,000 classes, but this source has 1",
        "ImageNet-1K has 1,281,167 train images, but this source has 2",
    )


TARS = {
    "flat": (("pets-train-0.tar", "pets-test-0.tar"), {"train": 2, "test": 2}),
    "folders": (("train/0.tar", "valid/0.tar", "test/0.tar"), {"train": 2, "val": 2, "test": 2}),
    "validation": (("train/0.tar", "validation/0.tar"), {"train": 2, "val": 2}),
    "wrapper": (("pets/train/0.tar", "pets/val/0.tar"), {"train": 2, "val": 2}),
    "parts": (("train/a/0.tar", "train/b/0.tar", "val.tar"), {"train": 4, "val": 2}),
    "no split": (("valley.tar", "testimonials.tar"), {"train": 4}),
    "upper case": (("TRAIN.TAR", "VAL.TAR"), {"train": 2, "val": 2}),
}


@pytest.mark.parametrize("name", TARS)
def test_the_split_of_a_tar_follows_from_its_path(name: str, tmp_path: Path) -> None:
    paths, expected = TARS[name]
    for path in paths:
        samples_tar(tmp_path / "in" / path, 2)
    assert detect_layout(tmp_path / "in") == "webdataset"
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert counts(found) == expected
    keys = [entry.key for split in found.splits.values() for entry in split.entries(0, len(split))]
    assert len(set(keys)) == len(keys), "tars with the same name in different folders must have different keys"


def test_indexed_tars_keep_their_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pets-train-0", "pets-val-0", "pets-test-0"):
        samples_tar(tmp_path / f"{name}.tar", 2)
    manifest = index_tars(sorted(tmp_path.glob("*.tar")), ImageRules(), workers=1)
    assert {split: entry.samples for split, entry in manifest.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert (tmp_path / "test.index.npy").exists()
    assert verify(tmp_path, workers=1) == []
    assert "note" not in capsys.readouterr().err


PARQUETS = {
    "hub, converted": (("default/train/0000", "default/test/0000"), {"train": 2, "test": 2}),
    "hub, by reference": (("refs/convert/parquet/a/train/0", "refs/convert/parquet/a/val/0"), {"train": 2, "val": 2}),
    "hub, data": (("data/train-00000-of-00002", "data/train-00001-of-00002", "data/dev-00000"), {"train": 4, "val": 2}),
    "word at the end": (("digits_train", "digits_validation", "digits-test"), {"train": 2, "val": 2, "test": 2}),
    "no word": (("testimonials", "valley"), {"train": 4}),
}


def parquet(path: Path, labels: list[int | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pa.array(labels, pa.int64())
    pq.write_table(pa.table({"image": [{"bytes": JPEG, "path": None}] * len(labels), "label": rows}), path)


@pytest.mark.parametrize("name", PARQUETS)
def test_the_split_of_a_parquet_file_follows_from_its_path(name: str, tmp_path: Path) -> None:
    paths, expected = PARQUETS[name]
    for path in paths:
        parquet(tmp_path / "in" / f"{path}.parquet", [0, 1])
    assert detect_layout(tmp_path / "in") == "parquet"
    assert counts(scan(tmp_path / "in", ONE, tmp_path / "spool")) == expected


@pytest.mark.parametrize("label", [-1, None])
def test_parquet_test_files_without_labels_are_reported_as_unused(label: int | None, tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "train.parquet", [0, 1])
    parquet(tmp_path / "in" / "test-0.parquet", [label] * 3)
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert counts(found) == {"train": 2}
    assert unused_counts(found) == {("image without a label", "rows"): 3}
    assert found.warnings == (f"{tmp_path}/in/test-0.parquet: 3 test images have no labels and are not used",)
    assert found.notes == (), "no note, because there is no test split"


@pytest.mark.parametrize("labels", [[0, -1], [-1, 0], [None, 1]])
def test_parquet_test_rows_with_labels_are_used(labels: list[int | None], tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "train.parquet", [0, 1])
    parquet(tmp_path / "in" / "test.parquet", labels)
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert counts(found) == {"train": 2, "test": 1}
    assert found.warnings[0] == f"{tmp_path}/in/test.parquet: 1 test images have no labels and are not used"


def test_training_rows_without_labels_are_rejected(tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "train.parquet", [-1, -1])
    with pytest.raises(UserError, match=r"train\.parquet: row 0: label -1 means that the image has no label"):
        scan(tmp_path / "in", ONE, tmp_path / "spool")


CLASS_TARS = ("n00000000", "n00000001", "n00000002")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ((".",), {"train": 6}),
        (("winter21_whole",), {"train": 6}),
        (("train", "val"), {"train": 6, "val": 6}),
        (("imagenet21k_train", "imagenet21k_val", "imagenet21k_test"), {"train": 6, "val": 6, "test": 6}),
    ],
)
def test_one_tar_per_class_is_a_layout(folders: tuple[str, ...], expected: dict[str, int], tmp_path: Path) -> None:
    for folder in folders:
        for name in CLASS_TARS:
            tar(tmp_path / "in" / folder / f"{name}.tar", f"{name}_0.JPEG", f"{name}_1.JPEG")
    assert detect_layout(tmp_path / "in") == "class-tars"
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert (counts(found), classes(found)) == (expected, list(CLASS_TARS))
    assert "the tars contain only images, so each tar is read as one class: 3 classes" in found.notes[0]


def test_class_tars_give_the_same_shards_as_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(CLASS_TARS):
        write(tmp_path / "folders" / name / "a.JPEG", jpeg(number))
        with tarfile.open((tmp_path / f"{name}.tar"), "w") as out:
            out.add(tmp_path / "folders" / name, arcname=f"./{name}")
    (tmp_path / "tars").mkdir()
    for name in CLASS_TARS:
        (tmp_path / f"{name}.tar").rename(tmp_path / "tars" / f"{name}.tar")
    for source in ("folders", "tars"):
        assert convert(tmp_path / source, tmp_path / f"{source}-set", Options(scan=ONE)) is not None
    for name in ("train-000000.tar", "train.index.npy"):
        assert (tmp_path / "tars-set" / name).read_bytes() == (tmp_path / "folders-set" / name).read_bytes()


def test_a_class_tar_with_a_name_similar_to_a_split_causes_one_warning(tmp_path: Path) -> None:
    for name in ("cat", "tests"):
        tar(tmp_path / "in" / f"{name}.tar", f"{name}_0.JPEG", f"{name}_1.JPEG")
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    (line,) = [line for line in (*found.notes, *found.warnings) if "resembles" in line]
    assert line.startswith("'tests': read as a class, although its name resembles split 'test'")


def test_unused_members_of_class_tars_are_counted(tmp_path: Path) -> None:
    tar(tmp_path / "in/cat.tar", "0.jpg", "._0.jpg", "__MACOSX/0.jpg", ".1.jpg.part")
    tar(tmp_path / "in/dog.tar", "0.jpg")
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert counts(found) == {"train": 2}
    assert sum(unused_counts(found).values()) == 3


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (("pets-000000.tar", "pets-000001.tar"), "class-tars"),
        (("train.tar", "val.tar"), "webdataset"),
        (("images.tar",), "webdataset"),
    ],
)
def test_tars_of_only_images_may_have_another_layout(names: tuple[str, ...], layout: str, tmp_path: Path) -> None:
    """Numbered tars cause a warning; tars named like splits, and a single tar, are WebDataset tars without samples."""
    for name in names:
        tar(tmp_path / "in" / name, "0.jpg", "1.jpg")
    assert detect_layout(tmp_path / "in") == layout
    if layout == "webdataset":
        with pytest.raises(UserError, match="no samples: "):
            scan(tmp_path / "in", ONE, tmp_path / "spool")
    else:
        assert "named like numbered shards" in scan(tmp_path / "in", ONE, tmp_path / "spool").warnings[0]


def test_invalid_class_tars_are_rejected_by_name(tmp_path: Path) -> None:
    options = ScanOptions(layout="class-tars")
    tar(tmp_path / "in/cat.tar", "0.jpg")
    tar(tmp_path / "in/dog.tar", "readme.txt")
    with pytest.raises(UserError, match=r"dog\.tar: the class tar has no images"):
        scan(tmp_path / "in", options, tmp_path / "spool")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no tars found; expected CLASS\.tar"):
        scan(tmp_path / "empty", options, tmp_path / "spool")
    with pytest.raises(UserError, match=r"in: no ILSVRC2012_img_train\.tar .*--from class-tars"):
        scan(tmp_path / "in", ScanOptions(layout="ilsvrc"), tmp_path / "spool")


def test_ilsvrc_test_tars_are_reported_as_unused(tmp_path: Path) -> None:
    tar(tmp_path / "n00000000.tar", "0.JPEG")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/ILSVRC2012_img_train.tar", "w") as out:
        out.add(tmp_path / "n00000000.tar", arcname="n00000000.tar")
    tar(tmp_path / "in/ILSVRC2012_img_test_v10102019.tar", "0.JPEG")
    found = scan(tmp_path / "in", ONE, tmp_path / "spool")
    assert counts(found) == {"train": 1}
    assert ("tar not used by this layout", ".tar") in unused_counts(found)
    reason = "ILSVRC2012_img_test_v10102019.tar: not used, because the test images have no labels"
    assert any(reason in note for note in found.notes)
