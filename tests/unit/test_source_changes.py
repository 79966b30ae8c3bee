"""A conversion is resumed only if its source is unchanged; a complete set no longer needs its source."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from shards.commands.command_line import Shard
from shards.convert.convert import convert, default_out, finish
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.convert.source_attribute import ATTRIBUTE
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.sources.scan import ScanOptions
from tests.support.folder_listings import count_listings
from tests.support.sources import class_folders, folders, jpeg, labeled_tar, tars

SMALL = Options(shard_bytes=4000, scan=ScanOptions(workers=1))
STARTS = ("convert", "part", "finish")


def class_tars(root: Path) -> Path:
    for name in ("cat", "dog"):
        class_tar(root / f"{name}.tar", 3)
    return root


def class_tar(path: Path, images: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unpacked = class_folders(path.parent.parent / f"unpacked-{path.stem}", {path.stem: images})
    with tarfile.open(path, "w") as tar:
        for image in sorted((unpacked / path.stem).iterdir()):
            tar.add(image, image.name)
    shutil.rmtree(unpacked)


def tables(root: Path) -> Path:
    write_table(root / "train-0.parquet", [0, 1, 1])
    write_table(root / "train-1.parquet", [0, 1])
    return root


def write_table(path: Path, labels: list[int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(i), "path": None} for i in range(len(labels))]
    pq.write_table(pa.table({"image": images, "label": labels}), path)


def made_long_ago(source: Path) -> Path:
    """Set all modification times of a source to the past, so that any change is visible in them."""
    for path in (source, *source.rglob("*")):
        os.utime(path, (1_000_000, 1_000_000))
    return source


def start(how: str, source: Path, out: Path, options: Options = SMALL) -> object:
    if how == "finish":
        return finish(out, source=source, workers=1)
    return convert(source, out, options, ConversionPart(2, 2) if how == "part" else None)


def begin(source: Path, out: Path, how: str, *, complete: bool = False) -> None:
    """Write the shards of the first part, or of both parts if `how` or `complete` requires it."""
    convert(source, out, SMALL, ConversionPart(1, 2))
    if how == "finish" or complete:
        convert(source, out, SMALL, ConversionPart(2, 2))


Change = Callable[[Path], object]
MADE: dict[str, Callable[[Path], Path]] = {
    "folder": folders,
    "tars": tars,
    "class tars": class_tars,
    "parquet": tables,
}


@dataclass(frozen=True)
class Case:
    """A change of a source, and the message about it."""

    kind: str
    """Key of `MADE`."""
    what: str
    said: str
    """Regular expression of the message."""
    change: Change

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


GROWN = [
    Case("folder", "class", r"2 images added \(such as .*/cow/0.jpg\)", lambda s: class_folders(s / "train", {"cow": 2})),  # noqa: E501
    Case("folder", "image", r"1 image added \(such as .*/cat/9.jpg\)", lambda s: shutil.copy(jpg(s), s / "train/cat/9.jpg")),  # noqa: E501
    Case("folder", "split", r"6 images added \(such as .*/val/", lambda s: shutil.copytree(s / "train", s / "val")),
    Case("folder", "renamed", r"3 images added .*/tac/.*, 3 images removed .*/cat/", lambda s: jpg(s).parent.rename(s / "train/tac")),  # noqa: E501
    Case("tars", "tar", r"1 image added \(such as .*c.tar\[", lambda s: labeled_tar(s / "c.tar", [0])),
    Case("tars", "sample", r"1 image added \(such as .*b.tar\[", lambda s: labeled_tar(s / "b.tar", [1, 0, 1])),
    Case("tars", "labels", r"added .*, .* removed ", lambda s: labeled_tar(s / "b.tar", [0, 1])),
    Case("class tars", "class", r"2 images added \(such as .*cow.tar\[", lambda s: class_tar(s / "cow.tar", 2)),
    Case("parquet", "file", r"1 file added \(such as train-2.parquet\)", lambda s: write_table(s / "train-2.parquet", [0])),  # noqa: E501
    Case("parquet", "labels", r"1 file with a different content \(.*-1.parquet", lambda s: write_table(s / "train-1.parquet", [1, 1])),  # noqa: E501
    Case("parquet", "renamed", r"1 file added .*z.parquet\), 1 file removed", lambda s: (s / "train-0.parquet").rename(s / "z.parquet")),  # noqa: E501
]  # fmt: skip


def jpg(source: Path) -> Path:
    return source / "train" / "cat" / "0.jpg"


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("case", GROWN, ids=str)
def test_a_changed_source_is_rejected_until_it_is_restored(case: Case, how: str, tmp_path: Path) -> None:
    source, out = made_long_ago(MADE[case.kind](tmp_path / "in")), tmp_path / "set"
    shutil.copytree(source, tmp_path / "kept")
    begin(source, out, how)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    case.change(source)
    with pytest.raises(
        UserError, match=f"the source {source} has changed since the conversion was started: .*{case.said}"
    ) as caught:
        start(how, source, out)
    assert caught.value.exit_code == 2
    assert "restore the source, or specify another --out" in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "kept", source)
    if how == "part":
        start(how, source, out)
    assert finish(out, source=source, workers=1) if how != "convert" else convert(source, out, SMALL)


@pytest.mark.parametrize(
    ("fact", "change"),
    [
        ("1 image with a different size (such as {}/train/cat/0.jpg)", lambda s: jpg(s).write_bytes(jpeg(0, 80))),
        ("the content of images differ", lambda s: jpg(s).write_bytes(jpg(s).read_bytes()[:-1] + b"x")),
        ("names of its classes", lambda s: (s / "synset_words.txt").write_text("cat Tom\ndog Rex\n")),
    ],
    ids=["size", "content", "readable names"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["convert", "finish"])
def test_changes_that_keep_folder_times_are_detected_by_listing(
    fact: str, change: Change, how: str, tmp_path: Path
) -> None:
    source = folders(tmp_path / "in")
    begin(source, tmp_path / "set", how)
    change(source)
    with pytest.raises(UserError) as caught:
        start(how, source, tmp_path / "set")
    assert fact.format(source) in str(caught.value)


def test_a_split_off_validation_split_is_not_reported_as_a_change(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", {"a": 6, "b": 6})
    options = Options(shard_bytes=4000, scan=ScanOptions(workers=1, val_fraction=0.5))
    convert(source, tmp_path / "set", options, ConversionPart(1, 2))
    (source / "a" / "9.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match=r"was started: 1 image added \(such as .*a/9.jpg\); restore"):
        convert(source, tmp_path / "set", options)


def test_a_source_and_a_link_to_it_are_the_same_source(tmp_path: Path) -> None:
    source, link = folders(tmp_path / "in"), tmp_path / "link"
    link.symlink_to(source)
    convert(link, tmp_path / "set", SMALL, ConversionPart(1, 2))
    (source / "train" / "cat" / "9.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match=r"was started: 1 image added"):
        convert(source, tmp_path / "set", SMALL)
    (source / "train" / "cat" / "9.jpg").unlink()
    assert convert(source, tmp_path / "set", SMALL) is not None


@pytest.mark.parametrize("how", STARTS)
def test_new_files_that_are_not_images_are_not_a_change(how: str, tmp_path: Path) -> None:
    source = made_long_ago(folders(tmp_path / "in"))
    begin(source, tmp_path / "set", how)
    (source / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (source / "train" / "notes.txt").write_text("x")
    start(how, source, tmp_path / "set")


def test_a_part_does_not_list_a_source_whose_folders_are_unchanged(tmp_path: Path) -> None:
    """Otherwise thousands of parts would list millions of files at the same time."""
    source = made_long_ago(folders(tmp_path / "in"))
    begin(source, tmp_path / "set", "part")
    with count_listings(source) as listings:
        convert(source, tmp_path / "set", SMALL, ConversionPart(2, 2))
    assert listings == {}
    (source / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    with count_listings(source) as listings:
        convert(source, tmp_path / "set", SMALL, ConversionPart(2, 2))
    assert set(listings) > {"train/cat"}, "the changed source must be listed"


def test_a_change_within_the_second_of_the_listing_is_detected(tmp_path: Path) -> None:
    """Modification times in whole seconds do not show such a change."""
    source = folders(tmp_path / "in")
    begin(source, tmp_path / "set", "part")
    folder = source / "train" / "cat"
    was = folder.stat().st_mtime
    (folder / "9.jpg").write_bytes(jpeg(99))
    os.utime(folder, (was, was))
    scan_key = tmp_path / "set" / ".making" / "scan.key"
    os.utime(scan_key, (was, was))
    with pytest.raises(UserError, match=r"1 image added"):
        convert(source, tmp_path / "set", SMALL, ConversionPart(2, 2))


REMOVED = [
    Case("folder", "all", "it no longer exists", shutil.rmtree),
    Case("folder", "image", r"1 image removed \(such as .*/train/cat/0.jpg\)", lambda s: jpg(s).unlink()),
    Case("folder", "class", r"3 images removed \(such as .*/train/cat/", lambda s: shutil.rmtree(jpg(s).parent)),
    Case("folder", "content", r"it can no longer be read .*\(.*no class folders", lambda s: shutil.rmtree(s / "train")),
    Case("tars", "tar", r"2 images removed \(such as .*b.tar\[", lambda s: (s / "b.tar").unlink()),
    Case("parquet", "file", r"1 file removed \(such as train-1.parquet", lambda s: (s / "train-1.parquet").unlink()),
]


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("case", REMOVED, ids=str)
def test_a_source_may_be_removed_when_all_shards_are_written(
    case: Case, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users remove converted images to free disk space before the parts are joined."""
    source, out = made_long_ago(MADE[case.kind](tmp_path / "in")), tmp_path / "set"
    begin(source, out, how, complete=True)
    case.change(source)
    start(how, source, out)
    said = capsys.readouterr().err
    assert re.search(f"note: {source}: {case.said}.*; all shards were written before", said), said
    if how == "part":
        finish(out, source=source, workers=1)
    assert sum(entry.samples for entry in Manifest.load(out).splits.values()) in (5, 6)


def add_unseen(source: Path) -> None:
    """Add an image, and a class folder without images, which makes listing the source fail."""
    shutil.copy(jpg(source), source / "train/cat/9.jpg")
    (source / "train/extra").mkdir()


HIDDEN = [
    Case("folder", "image added", "it can no longer be read .*/extra: the class folder has no images", add_unseen),
    Case("tars", "tar emptied", "it can no longer be read with layout ", lambda s: (s / "b.tar").write_bytes(b"")),
]


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_a_changed_source_that_cannot_be_listed_is_rejected(case: Case, how: str, tmp_path: Path) -> None:
    source, out = made_long_ago(MADE[case.kind](tmp_path / "in")), tmp_path / "set"
    begin(source, out, how, complete=True)
    case.change(source)
    with pytest.raises(UserError, match=f"has changed since the conversion was started: {case.said}"):
        start(how, source, out)


def test_writing_the_set_into_the_source_is_not_a_change(tmp_path: Path) -> None:
    """Otherwise every part would list the entire source; one folder name is not UTF-8."""
    source = folders(tmp_path / "in")
    around = source / os.fsdecode(b"pets-\xff")
    (source / "train").rename(around)
    made_long_ago(source)
    convert(source, source / "set", SMALL, ConversionPart(1, 3))
    with count_listings(around) as listings:
        convert(source, source / "set", SMALL, ConversionPart(2, 3))
    assert listings == {}
    os.utime(around)
    with count_listings(around) as listings:
        convert(source, source / "set", SMALL, ConversionPart(3, 3))
    assert listings


@pytest.mark.parametrize("how", ["convert", "part"])
@pytest.mark.parametrize("case", REMOVED, ids=str)
def test_removing_images_of_missing_shards_is_rejected(case: Case, how: str, tmp_path: Path) -> None:
    source, out = made_long_ago(MADE[case.kind](tmp_path / "in")), tmp_path / "set"
    begin(source, out, how)
    case.change(source)
    with pytest.raises(UserError, match=f"{source} has changed since the conversion was started: {case.said}"):
        start(how, source, out)


@pytest.fixture
def attributes(tmp_path: Path) -> None:
    """Skip the test if the file system has no extended attributes, which store the location of the source."""
    try:
        os.setxattr(tmp_path, "user.test", b"")
    except OSError as error:
        pytest.skip(f"no attributes in {tmp_path}: {error.strerror}")


@pytest.mark.usefixtures("attributes")
@pytest.mark.parametrize("arguments", [{}, {"part": "2/2"}, {"finish": True}, {"layout": "folder"}])
def test_a_set_whose_source_was_removed_is_reported_as_complete(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = folders(tmp_path / "in"), tmp_path / "in-shards"
    convert(source, out, Options(scan=SMALL.scan))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    shutil.rmtree(source)
    assert Shard(source, workers=1, **arguments).run() == 0  # type: ignore[arg-type]
    output = capsys.readouterr()
    assert output.out == f"{out}: already complete\n"
    assert f"note: {source}: no longer exists, so the set was not compared with it\n" in output.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"seed": 1}, r"contains a conversion with other options \(seed was 0, now 1\)"),
        ({"layout": "webdataset"}, "source of layout 'folder', not 'webdataset'"),
    ],
)
def test_other_options_are_rejected_even_without_the_source(
    arguments: dict[str, object], fact: str, tmp_path: Path
) -> None:
    source, out = folders(tmp_path / "in"), tmp_path / "in-shards"
    convert(source, out, Options(scan=SMALL.scan))
    shutil.rmtree(source)
    with pytest.raises(UserError, match=fact):
        Shard(source, workers=1, **arguments).run()  # type: ignore[arg-type]


@pytest.mark.usefixtures("attributes")
def test_the_set_of_a_removed_source_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = labeled_tar(tmp_path / "pets.tar", [0, 1])
    command = Shard(file, workers=1)
    assert command.run() == 0
    file.unlink()
    assert command.run() == 0
    assert f"{tmp_path / 'pets-shards'}: already complete" in capsys.readouterr().out
    assert default_out(tmp_path / "never.was") == tmp_path / "never.was-shards"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"finish": True}, {"layout": "folder"}])
def test_a_source_that_never_existed_is_an_error(arguments: dict[str, object], known: bool, tmp_path: Path) -> None:
    """A copy of a set does not record the location of its source, so the source is unknown."""
    source, out = folders(tmp_path / "in"), tmp_path / "set"
    convert(source, out, Options(scan=SMALL.scan))
    if not known:
        shutil.rmtree(source)
        shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
        out = tmp_path / "copy"
        with suppress(OSError):
            os.removexattr(out, ATTRIBUTE)
    missing = tmp_path / "nowhere" if known else source
    with pytest.raises(UserError, match=f"{missing}: no such file or folder, and not known") as caught:
        Shard(missing, out=out, workers=1, **arguments).run()  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_a_missing_source_creates_no_files(tmp_path: Path) -> None:
    for arguments in ({}, {"part": "1/2"}):
        with pytest.raises(UserError, match="nowhere: no such file or folder"):
            Shard(tmp_path / "nowhere", workers=1, **arguments).run()  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
