"""Class numbers and class names are read, checked, and numbered, for every source layout and command."""

from __future__ import annotations

import io
import math
import shutil
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.commands.index_tars import index_tars
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.format.manifest import Manifest
from shards.format.manifest_fields import MAX_CLASSES
from shards.images.rules import ImageRules
from shards.redact import one_line
from shards.sources.layouts import parquet, parquet_unpack
from shards.sources.layouts.tar_samples import read_tar
from shards.sources.naming.labels import (
    MAX_LABEL,
    FileLabels,
    LabelReader,
    NoLabelError,
    NumberedClasses,
    number_classes,
    parse_label,
)
from shards.sources.scan import TEST, TRAIN, Scan, ScanOptions
from shards.workers.worker import Reporter

ONE = Options(scan=ScanOptions(workers=1))


@pytest.fixture(autouse=True)
def _pyarrow_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run pyarrow in this process, because starting one takes longer than most of these tests."""
    monkeypatch.setattr(parquet, "ISOLATED", False)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, labels: list[bytes], start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels, start):
            for name, data in ((f"{i:03d}.jpg", jpeg(i)), (f"{i:03d}.cls", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, labels: Any, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(i), "path": None} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def made(folder: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Return the class folders of a shard set, and the sorted labels of each split."""
    shard_set = ShardSet(folder)
    labels = {split: sorted(shard_set.index(split)["label"].tolist()) for split in shard_set.manifest.splits}
    return [entry.folder for entry in shard_set.manifest.classes], labels


# --- parsing one label ---

VALID: list[tuple[object, int | str]] = [
    (7, 7),
    (True, 1),
    (np.uint8(7), 7),
    (np.float16(7), 7),
    (7.0, 7),
    (Decimal("7.00"), 7),
    (-0.0, 0),
    ("7", 7),
    (" 7\n", 7),
    (b"7\n", 7),
    (b"\xef\xbb\xbf7", 7),
    ("007", 7),
    ("7.0", 7),
    ("7.000000000000000000e+00", 7),  # numpy.savetxt
    (MAX_CLASSES - 1, MAX_CLASSES - 1),
    ("cat", "cat"),
    (b"golden retriever\n", "golden retriever"),
    ("n01440764", "n01440764"),
    ("1_0", "1_0"),
    ("\u0663", "\u0663"),  # a non-ASCII digit
    ("café".encode(), "café"),
    ("a/b", "a/b"),
    ("infinite", "infinite"),
]
INVALID: list[tuple[object, str]] = [
    (0.5, "label 0.5 is not a class number"),
    ("0.5", "label 0.5 is not a class number"),
    (Decimal("0.5"), "label 0.5 is not a class number"),
    (math.inf, "label inf is not a class number"),
    ("-Infinity", "label -inf is not a class number"),
    ("1e999", "label inf is not a class number"),
    (-2, "label -2 is out of range; expected a class number from 0 to 999,999; number the classes from 0"),
    ("-2", "label -2 is out of range; expected a class number"),
    (-2.0, "label -2 is out of range; expected a class number"),
    (MAX_CLASSES, "label 1000000 is out of range; expected a class number"),
    (2**63, "label 9223372036854775808 is out of range; expected"),
    ("4000000000", "label 4000000000 is out of range; expected"),
    ("0" * 21, "has more than 20 digits"),
    ([0], "has type list"),
    ({"id": 0}, "has type dict"),
    ("[0, 1, 0]", "is a list or an object"),
    ('{"label": 0}', "is a list or an object"),
    ("0 1 0", "is a list or an object"),
    ("0,1", "is a list or an object"),
    ("a\nb", "line breaks or control characters"),
    ("a\x1b[31m", "line breaks or control characters"),
    (b"\xff\xfe", "is not UTF-8 text"),
    ("x" * (MAX_LABEL + 1), f"has more than {MAX_LABEL} characters"),
]
MISSING: list[object] = [None, math.nan, -1, -1.0, "-1", b"-1\n", "", b"", " ", "None", "nan", "null", Decimal("NaN")]


@pytest.mark.parametrize(("value", "label"), VALID, ids=repr)
def test_valid_labels_are_parsed(value: object, label: int | str) -> None:
    found = parse_label(value, "a.tar: 0.cls")
    assert (found, type(found)) == (label, type(label))


@pytest.mark.parametrize(("value", "message"), INVALID, ids=lambda value: repr(value)[:40])
def test_invalid_labels_are_rejected(value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_label(value, "a.tar: 0.cls")
    assert not isinstance(caught.value, NoLabelError)
    assert str(caught.value).startswith("a.tar: 0.cls: label ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_labels_are_detected(value: object) -> None:
    with pytest.raises(NoLabelError, match=r"^a\.tar: 0\.cls: label .* means that the image has no label; remove"):
        parse_label(value, "a.tar: 0.cls")


@given(number=st.integers(0, MAX_CLASSES - 1), zeros=st.integers(0, 8), space=st.text(" \t\r\n", max_size=3))
def test_a_class_number_is_parsed_from_every_representation(number: int, zeros: int, space: str) -> None:
    text = f"{space}{'0' * zeros}{number}{space}"
    forms: list[object] = [number, float(number), Decimal(number), np.int64(number), np.float64(number), text]
    forms += [text.encode(), f"{number}.", f"{number}.0", f"{float(number):.6e}" if number < 10**6 else text]
    assert {parse_label(form, "x") for form in forms} == {number}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(VALUES | st.from_regex(r"[-+0-9.eE_,\[\] naif]{1,30}", fullmatch=True))
def test_any_value_is_parsed_or_rejected_with_one_line_that_names_the_location(value: object) -> None:
    try:
        label = parse_label(value, "a.tar: 0.cls")
    except UserError as error:
        message = str(error)
        label = None
    if label is None:
        assert message.startswith("a.tar: 0.cls: label ")
        assert "\n" not in message
    elif isinstance(label, str):
        assert label
        assert label == label.strip() == one_line(label)
        assert parse_label(label, "again") == label
    else:
        assert 0 <= label < MAX_CLASSES


# --- numbering the labels of a source ---


def read(labels: list[Any], name: str = "a") -> FileLabels:
    reader = LabelReader()
    for i, label in enumerate(labels):
        reader.read(label, f"{name}: row {i}")
    return reader.found()


def labels_of(files: list[list[Any]], **how: Any) -> tuple[list[str], list[list[int]]]:
    """Return the class folders, and the label of every row of the files."""
    readers = [LabelReader() for _ in files]
    own = [[reader.read(label, "x") for label in labels] for reader, labels in zip(readers, files, strict=True)]
    found: NumberedClasses = number_classes([reader.found() for reader in readers], sum(map(len, files)), **how)
    moved = [[int(move[label]) for label in labels] for move, labels in zip(found.labels, own, strict=True)]
    return [entry.folder for entry in found.classes], moved


NAMES = st.lists(st.sampled_from(["cat", "dog", "Dog", "ant", "é", "z9", "10a"]), max_size=12)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_class_names_are_numbered_in_sorted_order_over_all_files(files: list[list[str]]) -> None:
    files[0] += ["cat", "cat"]  # at least one label, and one that occurs twice
    folders, labels = labels_of(files)
    assert folders == sorted({name for file in files for name in file})
    assert [[folders[label] for label in file] for file in labels] == files


@given(st.lists(st.lists(st.integers(0, 999), max_size=12), min_size=1, max_size=4))
def test_class_numbers_are_kept_as_labels(files: list[list[int]]) -> None:
    files[-1].append(5)
    folders, labels = labels_of(files)
    assert labels == files
    assert folders == [str(label) for label in range(max(max(file, default=0) for file in files) + 1)]


def test_mixed_class_numbers_and_names_are_rejected() -> None:
    with pytest.raises(UserError, match=r"^a: row 1: label 'cat', but a: row 0 has label 0: numbers and names"):
        read([0, "cat"])
    with pytest.raises(UserError, match=r"^a: row 2: label 3, but a: row 0 has label 'cat'"):
        read(["cat", "cat", 3])
    with pytest.raises(UserError, match=r"^b: row 0 is a class number, but a: row 0 is a class name; write all"):
        number_classes([read(["cat", "cat"]), read([1], "b")], 3)


@pytest.mark.parametrize(
    ("top", "images", "good"), [(999, 1, True), (1000, 1, False), (1999, 200, True), (2000, 200, False)]
)
def test_labels_that_far_exceed_the_number_of_images_are_rejected(top: int, images: int, good: bool) -> None:
    files = [read([0]), read([top, 1], "b")]
    if good:
        assert len(number_classes(files, images).classes) == top + 1
        return
    with pytest.raises(UserError, match=rf"^b: row 0: label {top} would require .* list all .* with --classes FILE"):
        number_classes(files, images)


def test_texts_that_never_repeat_are_rejected_as_captions() -> None:
    with pytest.raises(UserError, match=r"^a: row 0: label 'a dog': each of the 2 images has a different text"):
        number_classes([read(["a dog", "a cat"])], 2)


def test_too_many_class_names_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.sources.naming.labels.MAX_CLASSES", 2)
    with pytest.raises(UserError, match=r"^a: row 2: 3 different class names; at most 2 classes"):
        read(["a", "b", "c"])
    with pytest.raises(UserError, match=r"^a: row 0: 3 different class names"):
        number_classes([read(["a", "b"]), read(["a", "c"], "b")], 4)


CLASS_FILES = {
    "names": (["dog", "cat", "dog"], "cat\ndog\nemu\n", (["cat", "dog", "emu"], [1, 0, 1])),
    "names in another order": (["dog", "cat", "dog"], "dog\ncat\n", (["dog", "cat"], [0, 1, 0])),
    "a different name for each image": (["dog", "cat"], "dog\ncat\n", (["dog", "cat"], [0, 1])),
    "line n is for number n": ([1, 0, 1], "dog\ncat\n", (["dog", "cat"], [1, 0, 1])),
    "lines begin with numbers": ([1, 0, 1], "1 cat\n0 dog\n", (["1", "0"], [0, 1, 0])),
    "a large label": ([1500], "\n".join(f"c{i}" for i in range(1501)), ([f"c{i}" for i in range(1501)], [1500])),
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_a_classes_file_defines_order_and_names(name: str, tmp_path: Path) -> None:
    labels, text, (folders, moved) = CLASS_FILES[name]
    (tmp_path / "classes.txt").write_text(text)
    assert labels_of([labels], classes=tmp_path / "classes.txt") == (folders, [moved])


@pytest.mark.parametrize(
    ("labels", "text", "message"),
    [
        (["dog", "emu", "emu"], "cat\ndog\n", "does not list class 'emu'"),
        ([0, 2], "cat\ndog\n", "lists 2 classes, but label 2 occurs"),
        ([0, 1], "1 cat\n2 dog\n", "does not list class '0'"),  # numbers from 1, not line numbers
    ],
)
def test_a_classes_file_that_lacks_a_class_is_rejected(
    labels: list[Any], text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"classes\.txt: .*{message}"):
        labels_of([labels], classes=tmp_path / "classes.txt")


# --- every source layout and command ---


@pytest.mark.parametrize("labels", [[b"dog", b"cat", b"dog"], [b"2", b"0", b"2\n"]])
@pytest.mark.parametrize("workers", [1, 2])
def test_shard_and_index_determine_the_same_classes(labels: list[bytes], workers: int, tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / "in/train-0.tar", labels),
        write_tar(tmp_path / "in/train-1.tar", labels[1:], start=3),
        write_tar(tmp_path / "in/val-0.tar", labels[:1], start=5),
    ]
    convert(tmp_path / "in", tmp_path / "set", Options(scan=ScanOptions(workers=workers)))
    index_tars(tars, ImageRules(), workers=workers)
    expected = (["cat", "dog"], {"train": [0, 0, 1, 1, 1], "val": [1]})
    if labels[0] == b"2":
        expected = (["0", "1", "2"], {"train": [0, 0, 2, 2, 2], "val": [2]})
    assert made(tmp_path / "set") == made(tmp_path / "in") == expected


BAD_TARS = {
    "unlabeled": ([b"0", b"-1"], r"a\.tar: 001\.cls: label -1 means"),
    "a number above the images": ([b"0"] * 3 + [b"900000"], r"a\.tar: 003\.cls: label 900000 would require 900,001"),
    "captions": ([b"a cat", b"a dog"], r"a\.tar: 000\.cls: label 'a cat': each of the 2 images"),
    "mixed": ([b"0", b"cat"], r"a\.tar: 001\.cls: label 'cat', but .*a\.tar: 000\.cls has label 0"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_shard_and_index_reject_the_same_labels(name: str, tmp_path: Path) -> None:
    labels, message = BAD_TARS[name]
    tar = write_tar(tmp_path / "in/a.tar", labels)
    with pytest.raises(UserError, match=message) as shard:
        convert(tar.parent, tmp_path / "set", ONE)
    with pytest.raises(UserError, match=message) as index:
        index_tars([tar], ImageRules(), workers=1)
    assert str(shard.value) == str(index.value)
    assert list(tar.parent.iterdir()) == [tar]


def test_numbers_in_one_tar_and_names_in_another_are_rejected(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / "in/a.tar", [b"0", b"1"]), write_tar(tmp_path / "in/b.tar", [b"cat", b"cat"])]
    for message, act in (
        (
            r"b\.tar: 000\.cls: label 'cat', but .*a\.tar: 000\.cls has label 0",
            lambda: convert(tmp_path / "in", tmp_path / "set", ONE),
        ),
        (
            r"b\.tar: 000\.cls is a class name, but .*a\.tar: 000\.cls is a class number",
            lambda: index_tars(tars, ImageRules(), workers=1),
        ),
    ):
        with pytest.raises(UserError, match=message):
            act()


def test_images_without_labels_are_allowed_in_a_test_split(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "test-0.tar", [b"-1", b"1", b""])
    samples, unused = read_tar(tar, LabelReader(), TEST)
    assert [sample.key for sample in samples] == ["001"]
    assert [(entry.reason, entry.count) for entry in unused] == [("image without a label", 2)]
    with pytest.raises(NoLabelError, match=r"000\.cls"):
        read_tar(tar, LabelReader(), TRAIN)
    file = write_parquet(tmp_path / "test.parquet", [-1, 1, None])
    job = parquet_unpack.UnpackJob(file, tmp_path / "0.bin", unlabeled=True)
    parquet_unpack.unpack(job, Reporter(lambda items, size: None))
    record = parquet_unpack.load_unpacked(job)
    assert record is not None
    assert ([label for *_, label in record.images], record.unlabeled) == ([1], 2)


def scanned(folder: Path, spool: Path, **how: Any) -> Scan:
    return parquet.scan_parquet(folder, spool, 1, **how)


def text_column(labels: list[str], kind: pa.DataType) -> pa.Array:
    return pa.array(labels).cast(kind)


COLUMNS: dict[str, tuple[Any, list[str], list[int]]] = {
    "text": (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
    "large text": (text_column(["dog", "cat", "dog"], pa.large_string()), ["cat", "dog"], [1, 0, 1]),
    "binary": ([b"dog", b"cat", b"dog"], ["cat", "dog"], [1, 0, 1]),
    "dictionary": (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ["cat", "dog"], [1, 0, 1]),
    "dictionary of numbers": (pa.array([2, 0, 2]).dictionary_encode(), ["0", "1", "2"], [2, 0, 2]),
    "digits": (["1", "0", "1"], ["0", "1"], [1, 0, 1]),
    "bools": ([True, False, True], ["0", "1"], [1, 0, 1]),
    "unsigned": (pa.array([1, 0, 1], pa.uint64()), ["0", "1"], [1, 0, 1]),
    "floats": ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
    "half floats": (pa.array(np.array([1, 0, 1], np.float16)), ["0", "1"], [1, 0, 1]),
    "decimals": ([Decimal("1.0"), Decimal("0.0"), Decimal("1.0")], ["0", "1"], [1, 0, 1]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_label_columns_of_every_type_are_read(name: str, tmp_path: Path) -> None:
    column, folders, labels = COLUMNS[name]
    write_parquet(tmp_path / "in/train.parquet", column)
    found = scanned(tmp_path / "in", tmp_path / "spool")
    assert [entry.folder for entry in found.classes] == folders
    assert found.splits["train"].rows["label"].tolist() == labels
    shutil.rmtree(tmp_path / "in")


BAD_COLUMNS: dict[str, tuple[Any, str]] = {
    "vectors": ([[0, 1], [1, 0]], r"train\.parquet: column label has type list<.*>; expected one class number"),
    "structs": ([{"id": 0}, {"id": 1}], r"train\.parquet: column label has type struct<.*>; expected one class"),
    "dates": (pa.array([1, 2], pa.timestamp("s")), r"train\.parquet: column label has type timestamp"),
    "NaN": ([1.0, math.nan], r"train\.parquet: row 1: label nan means that the image has no label"),
    "missing": (["cat", None], r"train\.parquet: row 1: label None means"),
    "a fraction": ([0.0, 0.5], r"train\.parquet: row 1: label 0\.5 is not a class number"),
    "negative": ([0, -1], r"train\.parquet: row 1: label -1 means that the image has no label"),
    "ids": ([0, 90_000], r"train\.parquet: row 1: label 90000 would require 90,001 classes for 2 images"),
    "above all limits": ([0, 2**40], r"train\.parquet: row 1: label 1099511627776 is out of range; expected"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_invalid_label_columns_are_rejected(name: str, tmp_path: Path) -> None:
    column, message = BAD_COLUMNS[name]
    write_parquet(tmp_path / "in/train.parquet", column)
    with pytest.raises(UserError, match=message):
        scanned(tmp_path / "in", tmp_path / "spool")


def test_class_names_are_numbered_over_all_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/train-0.parquet", ["dog", "emu", "dog"])
    write_parquet(tmp_path / "in/train-1.parquet", ["cat", "dog"])
    for spool in ("spool", "spool"):  # the second scan reads the unpacked files
        found = scanned(tmp_path / "in", tmp_path / spool)
        assert [entry.folder for entry in found.classes] == ["cat", "dog", "emu"]
        train = found.splits["train"]
        assert train.rows["label"].tolist() == [1, 2, 1, 0, 1]
        assert [train.name(i).partition(b"/")[0].decode() for i in range(5)] == ["dog", "emu", "dog", "cat", "dog"]


def test_the_choice_between_label_columns_is_noted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/train.parquet", [1, 0], fine_label=[5, 6], coarse_label=[0, 0])
    found = scanned(tmp_path / "in", tmp_path / "spool")
    assert found.splits["train"].rows["label"].tolist() == [1, 0]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("labels are read from column 'label'; not used: fine_label, coarse_label")


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label"), ("Image", "label")])
def test_files_with_different_columns_are_rejected(image: str, label: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/train-0.parquet", [0, 1])
    pq.write_table(pa.table({image: [jpeg(1)], label: [1]}), tmp_path / "in/train-1.parquet")
    expected = rf"train-1\.parquet: images and labels are in columns {image} and {label}, but in train-0"
    with pytest.raises(UserError, match=expected):
        scanned(tmp_path / "in", tmp_path / "spool")


def hub(names: list[str]) -> dict[str, str]:
    listed = ", ".join(f'"{name}"' for name in names)
    return {"huggingface": f'{{"info": {{"features": {{"label": {{"names": [{listed}]}}}}}}}}'}


def test_class_names_in_the_metadata_are_used_and_checked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/train-0.parquet", [0, 1], hub(["cat", "dog", "emu"]))
    write_parquet(tmp_path / "in/train-1.parquet", [1])
    found = scanned(tmp_path / "in", tmp_path / "spool")
    assert [(entry.folder, entry.name) for entry in found.classes] == [("cat", None), ("dog", None), ("emu", None)]
    write_parquet(tmp_path / "in/train-1.parquet", [1], hub(["dog", "cat", "emu"]))
    with pytest.raises(UserError, match=r"train-1\.parquet: .*those in train-0\.parquet \(first at class 0\)"):
        scanned(tmp_path / "in", tmp_path / "spool2")
    write_parquet(tmp_path / "in/train-1.parquet", [1, 3], hub(["cat", "dog", "emu"]))
    with pytest.raises(UserError, match=r"train-1\.parquet: row 1: label 3, but .* names 3 classes \(0 to 2\)"):
        scanned(tmp_path / "in", tmp_path / "spool3")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tench, Tinca tinca", "crane"], [("tench, Tinca tinca", "tench"), ("crane", None)]),
        (["crane", "crane"], [("0", "crane"), ("1", "crane")]),
        (["cat", ""], [("0", "cat"), ("1", None)]),
    ],
)
def test_class_names_in_the_metadata_identify_classes_if_they_are_unique(
    names: list[str], expected: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    """Class numbers would be equal in different data sets, even with different classes."""
    write_parquet(tmp_path / "in/train-0.parquet", [0, 1], hub(names))
    found = scanned(tmp_path / "in", tmp_path / "spool")
    assert [(entry.folder, entry.name) for entry in found.classes] == expected


def test_shard_and_index_use_the_same_classes_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\temu, the bird\n")
    tar = write_tar(tmp_path / "in/a.tar", [b"0", b"1"])
    options = Options(scan=ScanOptions(classes=tmp_path / "classes.txt", workers=1))
    convert(tar.parent, tmp_path / "set", options)
    index_tars([tar], ImageRules(), classes=tmp_path / "classes.txt", workers=1)
    shard, index = Manifest.load(tmp_path / "set"), Manifest.load(tar.parent)
    assert shard.classes == index.classes
    assert [(entry.folder, entry.name) for entry in shard.classes] == [("cat", None), ("dog", "emu")]
