"""Likely mistakes in the classes of a source are reported, stored in dataset.json, and rejected by --strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from shards.commands.index_tars import index_tars
from shards.convert.convert import convert, finish
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.errors import ConversionFailed, UserError
from shards.format.manifest import Manifest
from shards.format.manifest_fields import ClassEntry
from shards.images.accept import accept
from shards.images.rules import ImageRules
from shards.sources.layouts.detect import scan
from shards.sources.naming.class_warnings import blank_image_warnings, class_warnings
from shards.sources.naming.classes import class_order
from shards.sources.scan import ScanOptions
from tests.support.sources import class_folders, encoded, jpeg, labeled_tar

ONE = Options(scan=ScanOptions(workers=1))


def classes(*folders: str) -> list[ClassEntry]:
    return [ClassEntry(folder=folder) for folder in folders]


def warnings(names: list[str], **counts: list[int]) -> str:
    found = {split: np.array(each, dtype=np.int64) for split, each in counts.items()}
    return "\n".join(class_warnings(classes(*names), found))


@pytest.mark.parametrize(
    ("names", "counts", "message"),
    [
        (["a", "b"], {"train": [2, 2], "val": [1, 1]}, ""),
        (["a", "b"], {"train": [2, 2]}, ""),
        (["a", "b"], {"val": [2, 2]}, ""),
        (["a", "b"], {"train": [2, 0], "val": [1, 1]}, "1 class has no training images: 'b'"),
        (["a", "b", "c"], {"train": [1, 1, 1], "val": [0, 1, 0]}, "2 classes have no validation images: 'a', 'c'"),
        (["a", "b"], {"train": [1, 1], "test": [0, 1]}, "1 class has no test images: 'a'"),
        (["a", "b", "c"], {"train": [1, 0, 1]}, "1 of 3 classes have no images in any split: 'b'"),
        (["0", "1", "2", "3", "4"], {"train": [1, 0, 0, 0, 1]}, "3 of 5 labels do not occur: 1 to 3"),
        (["0", "1", "2", "3"], {"train": [0, 1, 0, 1]}, "2 of 4 labels do not occur: 0, 2"),
        # A class without images in any split is reported once, not once per split.
        (
            ["0", "1", "2"],
            {"train": [1, 0, 0], "val": [0, 0, 1]},
            "1 of 3 labels do not occur: 1\n1 class has no training images: '2'\n1 class has no validation images: '0'",
        ),
    ],
)
def test_classes_without_images_are_reported(names: list[str], counts: dict[str, list[int]], message: str) -> None:
    assert warnings(names, **counts) == message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Daisy", "daisy"], "only in case: 'Daisy' and 'daisy'"),
        (["straße", "STRASSE"], r"only in case: 'stra\xdfe' and 'STRASSE'"),
        (["daisy", "daisy "], "only in spaces: 'daisy' and 'daisy '"),
        (["hot  dog", "hot dog"], "only in spaces: 'hot  dog' and 'hot dog'"),
        (["caf\u00e9", "cafe\u0301"], r"only in Unicode form: 'caf\xe9' and 'cafe\u0301'"),
        (["dog", "dog\u200b"], r"only in invisible characters: 'dog' and 'dog\u200b'"),
        (["01", "1"], "only in leading zeros: '01' and '1'"),
        (["Daisy", "daisy "], "only in case or spaces: 'Daisy' and 'daisy '"),
    ],
)
def test_similar_class_names_are_reported(names: list[str], message: str) -> None:
    assert warnings(names, train=[1] * len(names)) == f"names of classes differ {message}"


@pytest.mark.parametrize(
    "names", [["cat", "cats"], ["crane", "crane_bird"], ["10", "1"], ["café", "cafe"], ["ab", "a b"]]
)
def test_clearly_different_names_cause_no_warning(names: list[str]) -> None:
    assert warnings(names, train=[1] * len(names)) == ""


def test_long_lists_of_classes_are_shortened() -> None:
    message = warnings([f"c{i}" for i in range(100)], train=[1] * 100, val=[1] * 10 + [0] * 90)
    assert message.startswith("90 classes have no validation images: 'c10', ")
    assert message.endswith("'c17' and 82 more")


@given(st.lists(st.integers(0, 10**12), unique=True, min_size=1))
def test_class_folders_named_by_numbers_are_sorted_numerically(numbers: list[int]) -> None:
    assert class_order({b"%d" % number for number in numbers}) == [b"%d" % number for number in sorted(numbers)]


@given(st.sets(st.binary(min_size=1, max_size=3), min_size=1))
def test_other_class_folders_are_sorted_as_bytes(names: set[bytes]) -> None:
    assert class_order({*names, b"n"}) == sorted({*names, b"n"})


def test_labels_of_numbered_folders_follow_numeric_order(tmp_path: Path) -> None:
    for split in ("train", "val"):
        class_folders(tmp_path / "in" / split, {str(c): 1 for c in range(12)})
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert [entry.folder for entry in found.classes] == [str(c) for c in range(12)]
    (note,) = found.notes
    assert "names of the 12 class folders are numbers" in note
    assert "0, 1, 2, 3, ..., 11" in note
    assert "0, 1, 10, 11, ..., 9" in note
    assert found.warnings == ()


@pytest.mark.parametrize("names", ["0 1 2", "00 01 10", "n01440764 n01443537", "1 2 ten"])
def test_no_note_if_numeric_order_equals_text_order(names: str, tmp_path: Path) -> None:
    found = scan(class_folders(tmp_path / "in", dict.fromkeys(names.split(), 1)), ScanOptions(), tmp_path / "spool")
    assert [entry.folder for entry in found.classes] == names.split()
    assert found.notes == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("0 1 3", "numbered 0 to 3, without 2: "),
        ("1 2 3 7 8", "numbered 1 to 8, without 4 to 6: "),
        ("1 2 3", None),  # numbered from 1
        ("4711 9900 120034", None),  # no consecutive numbers
        ("0 1 x", None),
    ],
)
def test_gaps_in_the_numbers_of_class_folders_are_reported(names: str, message: str | None, tmp_path: Path) -> None:
    found = scan(class_folders(tmp_path / "in", dict.fromkeys(names.split(), 1)), ScanOptions(), tmp_path / "spool")
    assert len(found.warnings) == (message is not None)
    assert message is None or message in found.warnings[0]


def test_missing_labels_of_tars_are_reported(tmp_path: Path) -> None:
    labeled_tar(tmp_path / "in" / "train-0.tar", [0, 2, 5])
    labeled_tar(tmp_path / "in" / "val-0.tar", [0, 1])
    found = scan(tmp_path / "in", ScanOptions(), tmp_path / "spool")
    assert found.warnings == (
        "2 of 6 labels do not occur: 3 to 4",
        "1 class has no training images: '1'",
        "2 classes have no validation images: '2', '5'",
    )


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
BLACK = encoded(Image.new("RGB", (64, 64), (12, 12, 12)))


@pytest.mark.parametrize(
    ("image", "blank"),
    [
        (BLACK, True),
        (encoded(Image.new("RGB", (300, 200), "red")), True),
        (encoded(Image.new("L", (64, 64), 255)), True),
        (encoded(Image.fromarray(np.full((64, 64), 4095, np.uint16) >> 8), "PNG"), True),  # 12 of 16 bits
        (encoded(Image.new("RGB", (64, 64), "white"), "PNG"), True),
        (encoded(Image.fromarray(NOISE // 16)), True),  # nearly black, with many values
        (encoded(Image.fromarray(NOISE // 16), "PNG"), True),
        (encoded(Image.fromarray(NOISE // 4)), False),
        (jpeg(1, 64), False),
        (encoded(Image.new("RGB", (8, 8), "red")), False),  # too small to decide
        (encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)), "PNG"), False),
    ],
)
def test_blank_images_are_detected(image: bytes, blank: bool) -> None:
    assert accept(image, ImageRules()).blank == blank
    assert accept(image, ImageRules(max_side=48)).blank == blank


@pytest.mark.parametrize(("blank", "images", "message"), [(0, 10, 0), (1, 100, 0), (2, 100, 1), (10, 10, 1)])
def test_few_blank_images_cause_no_warning(blank: int, images: int, message: int) -> None:
    assert len(blank_image_warnings("train", blank, images)) == message


def two_classes(root: Path) -> Path:
    return class_folders(root, {"a": 4, "b": 4})


def test_warnings_that_depend_on_decoded_images(tmp_path: Path) -> None:
    source = two_classes(tmp_path / "in")
    for i in range(4):
        (source / "b" / f"{i}.jpg").write_bytes(b"no image")
    (source / "a" / "black.jpg").write_bytes(BLACK)
    expected = [
        "all training images of 1 class were rejected: 'b'",
        "1 of 5 train images are nearly black or of a single color (20.0%)",
    ]
    strict = Options(scan=ONE.scan, max_rejects=1.0, strict=True)
    with pytest.raises(ConversionFailed, match=r"--strict: all training images of 1 class .* \(and 1 more warnings\)"):
        convert(source, tmp_path / "set", strict)
    assert not (tmp_path / "set" / "dataset.json").exists()
    outcome = convert(source, tmp_path / "set", Options(scan=ONE.scan, max_rejects=1.0))
    assert outcome is not None
    assert outcome.manifest.made["warnings"] == expected


def test_strict_rejects_the_source_before_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 2, "B": 2, "b": 2})
    class_folders(tmp_path / "in" / "val", {"a": 2}, first=100)
    with pytest.raises(
        UserError, match=r"--strict: 2 classes have no validation images: 'B', 'b' \(and 1 more warnings\)"
    ):
        convert(tmp_path / "in", tmp_path / "set", Options(scan=ONE.scan, strict=True))
    assert not (tmp_path / "set").exists()
    message = capsys.readouterr().err
    assert "warning: names of classes differ only in case: 'B' and 'b'" in message, "all warnings must be printed"


def test_strict_applies_when_the_parts_of_a_conversion_are_joined(tmp_path: Path) -> None:
    source = two_classes(tmp_path / "in")
    (source / "a" / "black.jpg").write_bytes(BLACK)
    convert(source, tmp_path / "set", Options(scan=ONE.scan, strict=True), ConversionPart(1, 1))
    with pytest.raises(ConversionFailed, match="--strict: 1 of 9 train images are nearly black"):
        finish(tmp_path / "set", workers=1, strict=True)
    assert finish(tmp_path / "set", workers=1) is not None


def test_indexed_tars_have_warnings_and_unused_members(tmp_path: Path) -> None:
    tar = labeled_tar(tmp_path / "a.tar", [0, 2], {"readme.txt": b"x", "9.jpg": BLACK, "9.cls": b"2"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionFailed, match="--strict: 1 of 3 labels do not occur: 1"):
        index_tars([tar], ImageRules(), workers=1, strict=True)
    assert sorted(tmp_path.iterdir()) == before
    index_tars([tar], ImageRules(), workers=1)
    made = Manifest.load(tmp_path).made
    assert made["warnings"] == [
        "1 of 3 labels do not occur: 1",
        "1 of 3 train images are nearly black or of a single color (33.3%)",
    ]
    assert [(one["kind"], one["count"], one["example"]) for one in made["unused"]] == [(".txt", 1, "a.tar/readme.txt")]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.5, 0.98])
def test_val_fraction_keeps_an_image_of_each_class_in_both_splits(fraction: float, tmp_path: Path) -> None:
    sizes = {"a": 60, "b": 25, "c": 3, "d": 2, "e": 1}
    source = class_folders(tmp_path / "in", sizes)
    found = scan(source, ScanOptions(val_fraction=fraction), tmp_path / "spool")
    train, val = (np.bincount(found.splits[split].rows["label"], minlength=5) for split in ("train", "val"))
    assert (train + val).tolist() == list(sizes.values())
    assert (train > 0).all()
    assert (val[:4] > 0).all()
    assert val[0] == min(59, max(1, round(60 * fraction)))
    assert any("for 1 of 5 classes, the only image stays in training: 'e'" in note for note in found.notes)
    if fraction == 0.02:
        assert any("so one image is used for validation: 'b', 'c', 'd'" in note for note in found.notes)
    if fraction == 0.98:
        assert any("so one image stays in training: 'c', 'd'" in note for note in found.notes)


def test_val_fraction_is_rejected_if_every_class_has_only_one_image(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="no class has more than one image"):
        scan(source, ScanOptions(val_fraction=0.5), tmp_path / "spool")


def test_training_repeats_the_warnings_of_the_manifest(tmp_path: Path) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "in" / "val", {"a": 2}, first=100)
    convert(tmp_path / "in", tmp_path / "set", ONE)
    recipe = parse(
        ["--data", f"{tmp_path / 'set'}", "--out", f"{tmp_path / 'run'}", "--size", "32", "--global-batch", "4"]
    )
    feed = Feed.of(recipe, World(0, 1, 0, 1, torch.device("cpu")))
    assert feed.advice() == [f"warning: {tmp_path / 'set'}: 1 class has no validation images: 'b'"]
