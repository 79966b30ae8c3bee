"""Conversion: the same input gives the same bytes, and invalid input a one-line error."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.commands.command_line import Index, SamplePhotos, Shard
from shards.commands.inspect import Verify
from shards.commands.verify import verify
from shards.convert.convert import convert, default_out, finish
from shards.convert.options import Options
from shards.convert.parts import ConversionPart, lock_part
from shards.convert.work_folder import WorkFolder
from shards.convert.writer import ContainerReader
from shards.errors import ConversionFailed, ShardSetError, UserError
from shards.files import waiting
from shards.files.lock import RETRY_SECONDS, LockHeld, file_lock
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.sources.scan import Layout, ScanOptions

SMALL = Options(shard_bytes=400_000, scan=ScanOptions(workers=1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "photos"
    SamplePhotos(folder, count=40).run()
    return folder


@pytest.fixture(scope="module")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "set"
    convert(photos, out, SMALL)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jpeg(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 0)).save(out, "JPEG")
    return out.getvalue()


def class_folders(root: Path, classes: int = 2, images: int = 3) -> Path:
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(images):
            (root / f"c{c}" / f"{i}.jpg").write_bytes(jpeg(c * images + i))
    return root


def two_validation_folders(root: Path) -> Path:
    for split in ("train", "val", "validation"):
        class_folders(root / split)
    return root


def test_a_set_has_tars_indexes_and_a_manifest(photos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    outcome = convert(photos, out, SMALL)
    assert outcome is not None
    names = {Path(name).name for name in contents(out)}
    assert len([name for name in names if name.startswith("train-") and name.endswith(".tar")]) > 3
    assert {"dataset.json", "train.index.npy", "val.index.npy", "val-000000.tar", "val-000000.idx"} <= names
    assert contents(out) == reference, "a second conversion writes the same bytes"
    assert verify(out, workers=1) == []


def test_the_seed_determines_a_global_shuffle(photos: Path, tmp_path: Path) -> None:
    orders = {}
    for seed in (0, 1):
        convert(photos, tmp_path / str(seed), Options(scan=ScanOptions(seed=seed, workers=1)))
        orders[seed] = ShardSet(tmp_path / str(seed)).index("train")
    assert not np.array_equal(orders[0]["hash"], orders[1]["hash"])
    assert set(orders[0]["hash"]) == set(orders[1]["hash"])
    for index in orders.values():
        runs = 1 + np.count_nonzero(np.diff(index["label"].astype(int)))
        assert runs > len(index) / 2, "no long runs of a class"


def test_the_order_does_not_depend_on_other_files(photos: Path, tmp_path: Path) -> None:
    """Samples are sorted by a hash of their own names, so that removing one does not reorder the rest."""
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    victim = sorted((copy / "train").rglob("*.JPEG"))[0]
    victim.unlink()
    one = Options(scan=ScanOptions(workers=1))
    convert(photos, tmp_path / "all", one)
    convert(copy, tmp_path / "fewer", one)
    everything = list(ShardSet(tmp_path / "all").index("train")["hash"])
    fewer = list(ShardSet(tmp_path / "fewer").index("train")["hash"])
    assert len(fewer) == len(everything) - 1
    assert [h for h in everything if h in set(fewer)] == fewer


def test_shards_have_similar_sizes_below_the_limit(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "set", SMALL)
    sizes = [shard.bytes for shard in ShardSet(tmp_path / "set").split("train").shards]
    largest_sample = int(ShardSet(tmp_path / "set").index("train")["size"].max()) + 2048
    assert max(sizes) < SMALL.shard_bytes + largest_sample
    assert max(sizes) - min(sizes) < 2 * largest_sample, "no small last shard"


def test_the_manifest_contains_no_time_host_or_path(reference: dict[str, bytes]) -> None:
    made = json.loads(reference["dataset.json"])["made"]
    told = {"images", "unused", "notes", "warnings", "rejects_hash"}
    assert set(made) == {"tool", "source", "source_digest", "shuffled", "options"} | told
    assert made["source"] == "folder"
    assert made["options"]["shard_bytes"] == 400_000


def test_a_finished_set_is_not_modified(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Shard(photos, out=tmp_path / "set", shard_size=1, workers=1)
    assert command.run() == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert command.run() == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}


@pytest.mark.parametrize("lose", [".making/train-000001.json", ".making/train-000001.rows.npy", "train-000001.tar"])
def test_an_interrupted_run_resumes(photos: Path, tmp_path: Path, reference: dict[str, bytes], lose: str) -> None:
    """Two of three parts are done, one of their shards is damaged, and a killed process left temporary files."""
    out = tmp_path / "set"
    for k in (1, 2):
        convert(photos, out, SMALL, ConversionPart(k, 3))
    (out / ".train-000002.tar.0123abcd0123abcd.tmp").write_bytes(b"half a shard")
    (out / lose).unlink()
    convert(photos, out, SMALL)
    assert contents(out) == reference


def test_joined_parts_give_the_same_set(photos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    for k in (3, 1, 2):
        with pytest.raises(UserError):
            finish(out)
        assert convert(photos, out, SMALL, ConversionPart(k, 3)) is None
    assert finish(out) is not None
    assert contents(out) == reference
    assert finish(out) is None, "already complete"


def test_a_part_is_locked_while_it_is_converted(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    convert(photos, out, SMALL, ConversionPart(2, 2))
    with lock_part(WorkFolder(out), ConversionPart(1, 2)):
        with pytest.raises(LockHeld, match=f"part 1/2 of .* in use by process {os.getpid()} on "):
            convert(photos, out, SMALL, ConversionPart(1, 2))
        with pytest.raises(LockHeld, match="a different number of parts"):
            convert(photos, out, SMALL)
        convert(photos, out, SMALL, ConversionPart(2, 2))


def test_the_lock_of_a_dead_process_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "part.lock"
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": 999_999}))
    with file_lock(lock, "it"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert "999999" in capsys.readouterr().err
    assert lock.read_text() == ""


def test_waiting_for_a_lock_has_a_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, pauses = tmp_path / "part.lock", 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    held = pytest.raises(LockHeld, match=f"process {os.getpid()} on")
    with file_lock(lock, "it"), held, file_lock(lock, "it", wait=7.5):
        pass
    assert pauses == [RETRY_SECONDS] * 8, "until more than 7.5 s have passed"
    assert "waiting for it for up to 7.5 s" in capsys.readouterr().err


def test_a_lock_of_another_host_is_valid_until_its_heartbeat_is_stale(tmp_path: Path) -> None:
    lock = tmp_path / "part.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with pytest.raises(LockHeld, match="process 7 on elsewhere"), file_lock(lock, "it"):
        pass
    os.utime(lock, (0, 0))
    with file_lock(lock, "it"):
        pass


@pytest.mark.parametrize("content", ["[1]", "7", "null", '{"host": "elsewhere"}', '{"host'])
def test_a_lock_file_without_a_valid_owner_is_replaced(tmp_path: Path, content: str) -> None:
    lock = tmp_path / "part.lock"
    lock.write_text(content)
    with file_lock(lock, "it"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        lock.write_text(content)
        with pytest.raises(LockHeld, match="by another process"), file_lock(lock, "it"):
            pass


def test_a_lock_whose_file_was_lost_is_released_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    lock = tmp_path / "part.lock"
    with monkeypatch.context() as lost, file_lock(lock, "it"):
        lost.setattr(os, "ftruncate", stale)
    with file_lock(lock, "it"):
        pass


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/2\n", "١/٢", "1_0/20", "1/" + "9" * 5000])
def test_invalid_parts(text: str) -> None:
    with pytest.raises(UserError, match="K/N"):
        ConversionPart.parse(text)


def test_resuming_with_different_options_is_rejected(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    convert(photos, out, SMALL, ConversionPart(1, 2))
    other = Options(shard_bytes=500_000, scan=SMALL.scan)
    for _ in ("begun", "finished"):
        with pytest.raises(UserError, match="shard_bytes was 400000, now 500000"):
            convert(photos, out, other)
        convert(photos, out, SMALL)


def test_too_many_rejects_fail_with_a_list_and_without_a_manifest(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in" / "train", images=10)
    (source / "c0" / "0.jpg").write_bytes(b"no image at all")
    (source / "c1" / "1.jpg").write_bytes(b"")
    out = tmp_path / "set"
    with pytest.raises(ConversionFailed, match=r"2 of 20 images rejected.*--max-rejects") as caught:
        convert(tmp_path / "in", out, Options(max_rejects=0.09))
    assert caught.value.exit_code == 1
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert listed == [
        {"split": "train", "image": "c0/0.jpg", "reason": "not an image"},
        {"split": "train", "image": "c1/1.jpg", "reason": "empty file"},
    ]
    with pytest.raises(ShardSetError, match=r"no dataset\.json"):
        ShardSet(out)
    outcome = convert(tmp_path / "in", out, Options(max_rejects=0.1))  # converts no image again
    assert outcome is not None
    assert (outcome.rejected, outcome.manifest.splits["train"].samples) == (2, 18)
    assert verify(out, workers=1) == []


def test_a_shard_without_accepted_images_is_removed(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in" / "train", classes=1, images=8)
    options = Options(shard_bytes=2 * 3072, max_rejects=1.0, scan=ScanOptions(workers=1))
    convert(tmp_path / "in", tmp_path / "whole", options)
    whole = ShardSet(tmp_path / "whole")
    first = set(whole.index("train")["hash"][: whole.shard_samples("train")[0]])
    import xxhash

    for path in source.rglob("*.jpg"):
        if xxhash.xxh3_64_intdigest(path.read_bytes()) in first:
            path.write_bytes(b"x" * path.stat().st_size)
    convert(tmp_path / "in", tmp_path / "set", options)
    shard_set = ShardSet(tmp_path / "set")
    assert [shard.name for shard in shard_set.split("train").shards] == [
        shard.name for shard in whole.split("train").shards[1:]
    ]
    assert not (tmp_path / "set" / "train-000000.tar").exists()
    assert shard_set.index("train")["shard"].max() == len(shard_set.split("train").shards) - 1
    assert verify(tmp_path / "set", workers=1) == []


def test_a_split_without_accepted_images_fails(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", classes=1, images=2)
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ConversionFailed, match="all images of split 'train' were rejected"):
        convert(source, tmp_path / "set", Options(max_rejects=1.0))


def test_files_with_the_same_stem_get_distinct_keys(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "in", classes=1, images=1) / "c0"
    for i, name in enumerate(("same.jpg", "same.jpeg", "sa me.jpg", "sa_me.jpg")):
        (folder / name).write_bytes(jpeg(100 + i))
    convert(tmp_path / "in", tmp_path / "set", SMALL)
    import tarfile

    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
    assert len(set(names)) == 5
    assert sum(name.startswith("c0/same-") for name in names) == 2
    assert sum(name.startswith("c0/sa_me-") for name in names) == 2
    assert "c0/0.jpg" in names


@contextmanager
def without_privileges() -> Iterator[Path]:
    """Yield a folder of a user other than root, because root can read every file."""
    import mmap  # noqa: F401  # NumPy imports it at first use, when this user may no longer read Python's modules

    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield root
    finally:
        os.seteuid(user)
        shutil.rmtree(root)


def test_an_unreadable_image_is_a_storage_failure() -> None:
    """It is not a reject: after the permissions are restored, the conversion resumes."""
    with without_privileges() as root:
        source = class_folders(root / "in", images=4)
        for name in ("2.jpg", "no-suffix"):
            (source / "c0" / name).write_bytes(jpeg())
            (source / "c0" / name).chmod(0)
            with pytest.raises(UserError, match=rf"c0/{name}.*Permission denied") as caught:
                convert(source, root / f"set-{name}", Options(max_rejects=1.0))
            assert caught.value.exit_code == 1
            (source / "c0" / name).chmod(0o644)
            assert convert(source, root / f"set-{name}", Options(max_rejects=1.0)) is not None
        (source / "c1").chmod(0)
        with pytest.raises(ConversionFailed, match=r"c1.*Permission denied"):
            convert(source, root / "set2", Options())
        (source / "c1").chmod(0o755)
        (root / "readonly").mkdir(mode=0o555)
        with pytest.raises(ConversionFailed, match=r"readonly.*Permission denied"):
            convert(source, root / "readonly" / "set", Options())


@pytest.mark.parametrize("change", ["gone", "longer", "shorter"])
def test_a_source_that_changes_during_the_conversion_stops_it_and_can_be_restored(tmp_path: Path, change: str) -> None:
    source = class_folders(tmp_path / "in")
    out = tmp_path / "set"
    options = Options(shard_bytes=4000, scan=ScanOptions(workers=1))
    convert(source, tmp_path / "undisturbed", options)
    convert(source, out, options, ConversionPart(1, 6))  # lists the whole source, converts a sixth
    originals = contents(source)
    for path in source.rglob("*.jpg"):
        {
            "gone": lambda path: path.unlink(),
            "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
            "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        }[change](path)
    with pytest.raises(UserError, match=r"set: the source .*in has changed since the conversion .*c0.*; restore"):
        convert(source, out, options)
    listing, _ = WorkFolder(out).load_listing("train")  # what a shard reads that is written while the source changes
    with (
        ContainerReader() as reader,
        pytest.raises(ConversionFailed, match=r"in/c\d/\d.jpg: .* when the source was listed.*; restore the source"),
    ):
        reader.read(next(listing.entries(0, 1)))
    assert not list(out.glob("*.tmp"))
    assert not (out / "dataset.json").exists()
    for name, data in originals.items():
        (source / name).write_bytes(data)
        os.utime(source / name, (1, 1))  # restored with a different time
    convert(source, out, options)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda root: root / "nowhere", "nowhere: no such file or folder"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "empty: the folder is empty"),
        (lambda root: (root / "x" / "train").mkdir(parents=True) or root / "x", "train: no class folders"),
        (lambda root: (root / "x" / "c0").mkdir(parents=True) or root / "x", "c0: the class folder has no images"),
        (lambda root: (root / "f.txt").write_text("x") and root / "f.txt", "f.txt: unknown file type"),
        (
            lambda root: two_validation_folders(root / "x"),
            r"2 folders for split 'val' \(val, validation\), expected one",
        ),
    ],
)
def test_invalid_sources_are_rejected_without_leftovers(
    tmp_path: Path, prepare: Callable[[Path], Path], complaint: str
) -> None:
    source = prepare(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        convert(source, tmp_path / "set", Options())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("layout", [None, "folder"])
@pytest.mark.parametrize("place", ["out", "c0/out", "new/out"])
def test_an_output_among_the_class_folders_of_the_source_is_rejected(
    place: str, layout: Layout | None, tmp_path: Path
) -> None:
    source = class_folders(tmp_path / "in")
    before = contents(source)
    options = Options(scan=ScanOptions(workers=1, layout=layout))
    with pytest.raises(UserError, match=r"--out .*out: is inside .*in, .* read as a class folder; .*outside"):
        convert(source, source / place, options)
    assert contents(source) == before
    assert not (source / place).exists()


@pytest.mark.parametrize("place", ["shards", "train/.shards"])
def test_an_output_inside_the_source_but_outside_its_class_folders_is_accepted(place: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    outcome = convert(tmp_path, tmp_path / place, SMALL)
    assert outcome is not None
    assert len(outcome.manifest.classes) == 2


def test_the_summary_counts_unused_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "in")
    Shard(source, out=tmp_path / "clean", workers=1).run()
    assert "not used" not in capsys.readouterr().out
    (source / "c0" / "notes.txt").write_text("x")
    Shard(source, out=tmp_path / "set", workers=1).run()
    assert "not used: 1 .txt: not an image (such as c0/notes.txt)" in capsys.readouterr().out


def test_a_non_empty_folder_that_is_not_a_set_is_not_modified(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a shard set"):
        convert(photos, tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"shard_size": 0}, "--shard-size 0"),
        ({"workers": 0}, "--workers 0"),
        ({"max_side": -1}, "--max-side -1"),
        ({"quality": 101}, "--quality 101"),
        ({"seed": -1}, "--seed -1"),
        ({"max_rejects": 1.5}, "--max-rejects 1.5"),
        ({"smart_ratio": 0.5}, "--smart-ratio 0.5"),
        ({"smart_ratio": math.nan}, "--smart-ratio nan"),
        ({"smart_ratio": math.inf}, "--smart-ratio inf"),
        ({"max_rejects": math.nan}, "--max-rejects nan"),
        ({"max_rejects": -0.1}, "--max-rejects -0.1"),
        ({"val_fraction": math.nan}, "--val-fraction nan"),
        ({"val_fraction": -1}, "--val-fraction -1"),
        ({"val_fraction": 1.0}, "--val-fraction 1"),
        ({"shard_size": 10**15}, "--shard-size 1000000000000000: .* to 1,048,576"),
        ({"max_side": 10**30}, r"--max-side 1000000000000000000000000000000: expected .* to 65,500"),
        ({"short_side": 10**6}, "--short-side 1000000"),
        ({"quality": 0}, "--quality 0"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"workers": 10**9}, "--workers 1000000000"),
        ({"part": ""}, "--part "),
        ({"part": "1/10000000"}, "--part 1/10000000"),
        ({"part": "1/2", "finish": True}, "--part 1/2 --finish"),
        ({"classes": Path("/")}, "/: "),
    ],
)
def test_options_out_of_range(photos: Path, tmp_path: Path, option: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Shard(photos, out=tmp_path / "set", **option).run()
    assert caught.value.exit_code == 2
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "command",
    [
        Index((Path("a.tar"),), max_rejects=math.nan),
        Index((Path("a.tar"),), workers=-1),
        Verify(Path("set"), workers=0),
        Verify(Path("set"), workers=10**9),
        SamplePhotos(Path("photos"), count=10**10),
        SamplePhotos(Path("photos"), count=-5),
        SamplePhotos(Path("photos"), count=40, seed=-1),
    ],
)
def test_options_of_other_commands_out_of_range(
    command: Index | Verify | SamplePhotos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--(max-rejects|workers|count|seed) \S+: expected a (whole )?number from "):
        command.run()
    assert not list(tmp_path.iterdir())


def test_default_folder_of_a_set(tmp_path: Path) -> None:
    assert default_out(tmp_path / "imagenet") == tmp_path / "imagenet-shards"
    assert default_out(Path(f"{tmp_path}/imagenet/")) == tmp_path / "imagenet-shards"
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    assert default_out(tmp_path / "ILSVRC2012_img_train.tar") == tmp_path / "ILSVRC2012_img_train-shards"


def test_resuming_from_another_folder(
    photos: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    convert(Path("photos"), tmp_path / "set", SMALL, ConversionPart(1, 2))
    monkeypatch.chdir(tmp_path)
    convert(photos, Path("set"), SMALL)
    assert contents(tmp_path / "set") == reference


def test_another_version_of_the_tool_does_not_resume(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    convert(photos, out, SMALL, ConversionPart(1, 2))
    work = WorkFolder(out)
    plan = work.load_plan()
    assert plan is not None
    work.save_plan(replace(plan, tool="fat-pipeline 99"))
    with pytest.raises(UserError, match=r"was started by fat-pipeline 99"):
        convert(photos, out, SMALL)


def test_shrinking_all_images_of_a_set(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "set", Options(rules=ImageRules(max_side=100, quality=80), scan=ScanOptions(workers=1)))
    index = ShardSet(tmp_path / "set").index("train")
    assert np.maximum(index["height"], index["width"]).max() == 100
    assert index["repaired"].sum() == 0
    assert verify(tmp_path / "set", workers=1) == []
