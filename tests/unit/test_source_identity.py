"""A shard set is not continued or confirmed with another source, or with a changed source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.convert.convert import convert, finish
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.convert.work_folder import WorkFolder
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.format.manifest_fields import ClassEntry
from shards.sources.identity import digest_of_listing
from shards.sources.layouts import parquet
from shards.sources.layouts.detect import scan
from shards.sources.listing import Container, ListingBuilder
from shards.sources.scan import Scan, ScanOptions
from shards.sources.walk import WORK_FOLDER
from tests.support.sources import class_folders, folders, jpeg, labeled_tar, tars

SMALL = Options(shard_bytes=4000, scan=ScanOptions(workers=1))


def tables(root: Path) -> Path:
    write_table(root / "train-0.parquet", [0, 1, 1])
    write_table(root / "train-1.parquet", [0, 1])
    return root


def write_table(path: Path, labels: list[int], metadata: dict[bytes, bytes] | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(i), "path": None} for i in range(len(labels))]
    pq.write_table(pa.table({"image": images, "label": labels}, metadata=metadata), path)


MADE: dict[str, Callable[[Path], Path]] = {"folder": folders, "tars": tars, "parquet": tables}

CHANGES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("folder", "class added", lambda root: class_folders(root / "train", {"cow": 1})),
    ("folder", "image added", lambda root: (root / "train/cat/9.jpg").write_bytes(jpeg(9))),
    ("folder", "image removed", lambda root: (root / "train/cat/0.jpg").unlink()),
    ("folder", "image size changed", lambda root: (root / "train/cat/0.jpg").write_bytes(jpeg(9, 80))),
    ("folder", "class renamed", lambda root: (root / "train/cat").rename(root / "train/tac")),
    ("folder", "image moved", lambda root: (root / "train/cat/0.jpg").rename(root / "train/dog/7.jpg")),
    ("folder", "split added", lambda root: shutil.copytree(root / "train", root / "val")),
    ("folder", "readable names added", lambda root: (root / "synset_words.txt").write_text("cat Tom\ndog Rex\n")),
    ("tars", "tar added", lambda root: labeled_tar(root / "c.tar", [0])),
    ("tars", "tar removed", lambda root: (root / "b.tar").unlink()),
    ("tars", "tar renamed", lambda root: (root / "a.tar").rename(root / "z.tar")),
    ("tars", "label changed", lambda root: labeled_tar(root / "b.tar", [0, 0])),
    ("tars", "sample added", lambda root: labeled_tar(root / "b.tar", [1, 0, 1])),
    ("tars", "labels swapped in a tar", lambda root: labeled_tar(root / "b.tar", [0, 1])),
    ("parquet", "file added", lambda root: write_table(root / "train-2.parquet", [0])),
    ("parquet", "file removed", lambda root: (root / "train-1.parquet").unlink()),
    ("parquet", "row added", lambda root: write_table(root / "train-1.parquet", [0, 1, 1])),
    ("parquet", "label changed in a table", lambda root: write_table(root / "train-1.parquet", [1, 1])),
    ("parquet", "labels swapped in a table", lambda root: write_table(root / "train-1.parquet", [1, 0])),
    ("parquet", "file renamed", lambda root: (root / "train-1.parquet").rename(root / "train-9.parquet")),
]


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, _, change in CHANGES], ids=[c[1] for c in CHANGES]
)
def test_a_complete_set_is_rejected_for_a_changed_source(
    kind: str, change: Callable[[Path], object], tmp_path: Path
) -> None:
    source, out = MADE[kind](tmp_path / "in"), tmp_path / "set"
    convert(source, out, SMALL)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert convert(source, out, SMALL) is None
    change(source)
    for start in (lambda: convert(source, out, SMALL), lambda: finish(out, source=source)):
        with pytest.raises(UserError, match=f"{out}: was converted from a different .* than {source}, or ") as caught:
            start()
        assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_set_is_rejected_for_another_source(tmp_path: Path) -> None:
    a = folders(tmp_path / "A")
    b = class_folders(tmp_path / "B" / "train", {"bus": 3, "car": 3}).parent
    convert(a, tmp_path / "done", SMALL)
    with pytest.raises(UserError, match=r"done: was converted from a different .* than .*B, .* classes 'cat', 'dog'\)"):
        convert(b, tmp_path / "done", SMALL)
    convert(a, tmp_path / "begun", SMALL, ConversionPart(1, 2))
    convert(a, tmp_path / "begun", SMALL, ConversionPart(2, 2))
    for start in (lambda: convert(b, tmp_path / "begun", SMALL), lambda: finish(tmp_path / "begun", source=b)):
        with pytest.raises(UserError, match=r"begun: contains a conversion of .*A, not of .*B; specify that") as caught:
            start()
        assert caught.value.exit_code == 2
    for other in (tars, tables):
        with pytest.raises(UserError, match="was converted from a different source than"):
            convert(other(tmp_path / other.__name__), tmp_path / "done", SMALL)


@pytest.mark.parametrize("kind", MADE)
def test_a_copy_of_a_source_is_the_same_source_and_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    source = MADE[kind](tmp_path / "in")
    (tmp_path / "far" / "away").mkdir(parents=True)
    copy = tmp_path / "far" / "away" / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    convert(source, tmp_path / "set", SMALL)
    assert convert(copy, tmp_path / "set", SMALL) is None
    convert(copy, tmp_path / "other", SMALL)
    assert all(
        (tmp_path / "other" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "set").iterdir()
    )


def test_notes_and_warnings_in_the_manifest_contain_no_absolute_path(tmp_path: Path) -> None:
    source = folders(tmp_path / "in")
    (source / "train" / "loose.jpg").write_bytes(jpeg(5))
    outcome = convert(source, tmp_path / "set", SMALL)
    assert outcome is not None
    assert outcome.manifest.made["warnings"][0].startswith("train: 1 images outside any class folder are not used")
    assert str(tmp_path) not in (tmp_path / "set" / "dataset.json").read_text()


def test_notes_on_a_single_file_contain_no_absolute_path(tmp_path: Path) -> None:
    """The note on damaged Hugging Face metadata begins with the path of the file."""
    made = []
    for name in ("one", "two"):
        file = tmp_path / name / f"{name}.parquet"
        write_table(file, [0, 1], metadata={b"huggingface": b"{"})
        outcome = convert(file, tmp_path / f"{name}-set", SMALL)
        assert outcome is not None
        made.append(outcome.manifest.made["notes"])
    assert made[0] == made[1] != []
    assert made[0][0].startswith("the source: the Hugging Face metadata is damaged")


def test_unused_files_and_modification_times_do_not_change_a_source(tmp_path: Path) -> None:
    source = folders(tmp_path / "in")
    convert(source, tmp_path / "set", SMALL)
    (source / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    os.utime(source / "train" / "dog" / "0.jpg", (1, 1))
    assert convert(source, tmp_path / "set", SMALL) is None


def test_the_digest_depends_on_labels() -> None:
    digests = set()
    for labels in ((0, 1), (1, 0), (0, 0)):
        builder = ListingBuilder()
        builder.add_ranges(Container(Path("a"), 9, 9), [(b"%d" % i, i, 1, label) for i, label in enumerate(labels)])
        digests.add(
            digest_of_listing(
                Scan("webdataset", (ClassEntry(folder="0"), ClassEntry(folder="1")), {"train": builder.build()})
            )
        )
    assert len(digests) == 3


def test_the_digest_does_not_depend_on_options(tmp_path: Path) -> None:
    first = class_folders(tmp_path / "in", {"a": 2, "b": 2})
    digests = {scan(first, ScanOptions(), tmp_path / "spool").digest}
    digests.add(scan(first, ScanOptions(val_fraction=0.5, seed=3), tmp_path / "spool").digest)
    assert len(digests) == 1


def test_another_layout_for_a_complete_set_is_rejected(tmp_path: Path) -> None:
    source = folders(tmp_path / "in")
    convert(source, tmp_path / "set", SMALL)
    with pytest.raises(UserError, match="source of layout 'folder', not 'webdataset'; omit --from"):
        convert(source, tmp_path / "set", Options(shard_bytes=4000, scan=ScanOptions(layout="webdataset", workers=1)))
    assert Manifest.load(tmp_path / "set").made["source"] == "folder"


@pytest.mark.parametrize("differs", ["tool", "source", "options"])
def test_spool_files_of_a_killed_scan_are_used_only_by_the_same_conversion(
    differs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tables(tmp_path / "in"), tmp_path / "set"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save_plan", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, SMALL)
    spooled = sorted((out / WORK_FOLDER / "spool").glob("*.bin"))
    times = [path.stat().st_mtime_ns for path in spooled]
    assert len(spooled) == 2
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save_plan", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, SMALL)
    assert [path.stat().st_mtime_ns for path in spooled] == times, "the same conversion must reuse them"
    options = SMALL
    if differs == "tool":
        monkeypatch.setattr("shards.convert.convert.tool_version", lambda: "fat-pipeline 99")
    elif differs == "source":
        source = tables(tmp_path / "other")
        (source / "train-1.parquet").unlink()
    else:
        options = Options(shard_bytes=4000, scan=ScanOptions(val_fraction=0.5, workers=1))
    unpacked: list[Path] = []
    unpack = parquet.unpack
    monkeypatch.setattr(parquet, "unpack", lambda job, report: (unpacked.append(job.spool), unpack(job, report))[1])
    for path in spooled:  # detects their use
        path.write_bytes(b"\0" * path.stat().st_size)
    assert convert(source, out, options) is not None
    assert not (out / "rejects.jsonl").exists()
    assert len(unpacked) == (1 if differs == "source" else 2)
