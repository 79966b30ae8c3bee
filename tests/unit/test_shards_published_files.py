"""Files of other programs are never replaced; damaged files of this project are written again or reported."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards.convert.convert
import shards.files.lock
import shards.files.waiting
from shards.commands.index_tars import index_tars
from shards.commands.verify import verify
from shards.convert.convert import convert, finish
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.convert.work_folder import MARKER, WorkFolder
from shards.errors import ConversionFailed, UserError
from shards.files.lock import LockHeld, file_lock
from shards.format.tar import BLOCK
from shards.images.rules import ImageRules
from shards.sources.scan import ScanOptions
from shards.sources.walk import WORK_FOLDER as FOLDER

MINE = b"not made by any of these commands\n"


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "in"
    for i in range(12):
        path = root / ("train" if i < 9 else "val") / f"c{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return root


def options(form: str = "tar") -> Options:
    return Options(shard_bytes=5000, format=form, scan=ScanOptions(workers=1))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    made = {}
    for form in ("tar", "ffcv", "both"):
        out = tmp_path_factory.mktemp("reference") / "set"
        convert(source, out, options(form))
        made[form] = contents(out)
    return made


def begin(source: Path, out: Path, form: str = "tar") -> None:
    """Convert half of the shards."""
    convert(source, out, options(form), ConversionPart(1, 2))


def tars(folder: Path, bad: int = 0) -> list[Path]:
    """Write a training and a validation tar, not with `pipeline shard`; `bad` of the images are invalid."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for i in range(4):
                for suffix, data in (("jpg", jpeg(i) if i >= bad else b"no image"), ("cls", b"%d" % i)):
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return sorted(folder.glob("*.tar"))


@pytest.mark.parametrize("name", ["rejects.jsonl", "train.index.npy", "val.index.npy", "dataset.json", FOLDER])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_index_rejects_existing_files_before_any_work(name: str, kind: str, tmp_path: Path) -> None:
    found = tars(tmp_path)
    if kind == "file":
        (tmp_path / name).write_bytes(MINE)
    elif kind == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_bytes(MINE)
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").write_bytes(MINE)
        (tmp_path / name).symlink_to("elsewhere")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}.*(move it away|remove its dataset.json)") as caught:
        index_tars(found, ImageRules(), workers=1)
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("name", "fact"), [("tars", "is a folder; specify the tars"), ("none.tar", "no such file")])
def test_index_reports_what_is_not_a_tar(name: str, fact: str, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with pytest.raises(UserError, match=rf"/{name}: {fact}"):
        index_tars([tmp_path / name], ImageRules())
    assert [path.name for path in tmp_path.iterdir()] == ["tars"]


def test_index_replaces_files_of_its_own_failed_start(tmp_path: Path) -> None:
    found = tars(tmp_path, bad=1)
    with pytest.raises(ConversionFailed, match="2 of 8 images rejected"):
        index_tars(found, ImageRules(), workers=1)
    assert len((tmp_path / "rejects.jsonl").read_bytes().splitlines()) == 2
    index_tars(found, ImageRules(), max_rejects=0.5, workers=1)
    assert verify(tmp_path, workers=1) == []
    assert not (tmp_path / FOLDER).exists()


def test_index_does_not_replace_an_edited_list_of_rejects(tmp_path: Path) -> None:
    found = tars(tmp_path, bad=1)
    with pytest.raises(ConversionFailed):
        index_tars(found, ImageRules(), workers=1)
    (tmp_path / "rejects.jsonl").write_bytes(MINE)
    with pytest.raises(UserError, match=r"rejects.jsonl: was not written by this command"):
        index_tars(found, ImageRules(), max_rejects=0.5, workers=1)
    assert (tmp_path / "rejects.jsonl").read_bytes() == MINE


def test_index_rejects_an_unfinished_conversion(source: Path, tmp_path: Path) -> None:
    begin(source, tmp_path / "set")
    with pytest.raises(UserError, match="an unfinished conversion"):
        index_tars(sorted((tmp_path / "set").glob("*.tar")), ImageRules(), workers=1)


def test_index_fails_if_a_tar_is_modified_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tars(tmp_path)
    from shards.commands import index_tar as module

    read = module._read_image

    def touched(handle: int, member: module.Member) -> bytes:
        os.utime(found[0], (1, 1))
        return read(handle, member)

    monkeypatch.setattr(module, "_read_image", touched)
    with pytest.raises(ConversionFailed, match=r"train-0\.tar: was modified while it was indexed"):
        index_tars(found, ImageRules(), workers=1)
    assert not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize(
    ("form", "name", "kind"),
    [
        *(("tar", "train-000001.tar", kind) for kind in ("text", "empty", "a set's", "folder")),
        ("tar", "train-000001.idx", "text"),
        ("tar", "train-000001.idx", "a set's"),
        ("tar", "val-000000.tar", "text"),
        ("tar", "train.index.npy", "a set's"),
        ("tar", "rejects.jsonl", "a set's"),
        ("both", "val.beton", "a set's"),
        ("ffcv", "train.beton", "text"),
    ],
)
def test_a_conversion_does_not_replace_files_that_appeared_meanwhile(
    form: str, name: str, kind: str, *, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    begin(source, out, form)
    if (out / name).exists():
        name = name.replace("000001", "000002").replace("val-000000", "train-000002")
    if kind == "folder":
        (out / name).mkdir()
        (out / name / "mine").write_bytes(MINE)
    elif kind == "a set's":  # a file of the same name in a different set
        other = tmp_path / "other"
        for i in range(40):
            path = other / "train" / "x" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(100 + i))
        (other / "val" / "x").mkdir(parents=True)
        (other / "val" / "x" / "bad.jpg").write_bytes(b"no image")
        (other / "val" / "x" / "1.jpg").write_bytes(jpeg(1))
        convert(other, tmp_path / "theirs", Options(shard_bytes=5000, format="both", max_rejects=0.5))
        shutil.copy(tmp_path / "theirs" / name, out / name)
    else:
        (out / name).write_bytes(MINE if kind == "text" else b"")
    before = contents(out)
    for part in (None, ConversionPart(2, 2)):
        with pytest.raises(UserError, match=rf"{name}: was not written by this .*, so it is not replaced") as caught:
            convert(source, out, options(form), part)
        assert caught.value.exit_code == 2
        kept = contents(out)
        assert {key: kept[key] for key in before if not key.endswith(".lock")} == {
            key: before[key] for key in before if not key.endswith(".lock")
        }
        assert not any(key.startswith("train-") and key not in before for key in kept), "before any work"


def test_finish_does_not_replace_files_that_appeared_meanwhile(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    for k in (1, 2):
        convert(source, out, options(), ConversionPart(k, 2))
    for name in ("train.index.npy", "rejects.jsonl"):
        (out / name).write_bytes(MINE)
        with pytest.raises(UserError, match=f"{name}: was not written by this command"):
            finish(out)
        (out / name).unlink()
    (out / "dataset.json").write_bytes(MINE)
    with pytest.raises(UserError, match=r"dataset\.json"):
        finish(out)
    assert (out / "dataset.json").read_bytes() == MINE
    assert (out / FOLDER).is_dir()


@pytest.mark.parametrize(
    ("form", "step"),
    [("both", 11), *(pytest.param(form, 1, marks=pytest.mark.slow) for form in ("tar", "ffcv", "both"))],
)
def test_a_conversion_killed_between_any_two_files_resumes(
    form: str,
    step: int,
    *,
    source: Path,
    tmp_path: Path,
    reference: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every published file is recognized as created by this project, whichever rename was the last."""
    rename = Path.rename
    for killed_after in range(1, 200, step):
        out = tmp_path / f"set{killed_after}"
        done = 0

        def counted(self: Path, target: Path, last: int = killed_after) -> Path:
            nonlocal done
            if done == last:
                raise KeyboardInterrupt
            done += 1
            return rename(self, target)

        with monkeypatch.context() as killing:
            killing.setattr(Path, "rename", counted)
            try:
                convert(source, out, options(form))
            except KeyboardInterrupt:
                pass
            else:
                break
        convert(source, out, options(form))
        assert contents(out) == reference[form]
        shutil.rmtree(out)
    assert killed_after > 15


@pytest.mark.parametrize("removed", range(6))
def test_a_conversion_killed_while_it_removes_its_work_folder(
    removed: int, source: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    unlink = Path.unlink
    done = 0

    def counted(self: Path, missing_ok: bool = False) -> None:
        nonlocal done
        if self.parent.name == FOLDER and (done := done + 1) > removed * 9:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as killing:
        killing.setattr(Path, "unlink", counted)
        with suppress(KeyboardInterrupt):
            convert(source, out, options())
    assert convert(source, out, options()) is None
    assert contents(out) == reference["tar"]
    assert not (out / FOLDER).exists()


@pytest.mark.parametrize("inside", [True, False])
def test_a_work_folder_of_another_program_is_not_modified(inside: bool, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    (out / FOLDER).mkdir(parents=True)
    (out / FOLDER / ("mine" if inside else MARKER + "s")).write_bytes(MINE)
    before = contents(out)
    with pytest.raises(UserError, match=rf"{FOLDER}: is a folder without {MARKER} in it"):
        convert(source, out, options())
    assert contents(out) == before


def test_hidden_files_in_the_set_folder_are_kept(
    source: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]]
) -> None:
    """Only temporary files of the set are removed at the end."""
    out = tmp_path / "set"
    out.mkdir()
    mine = {".DS_Store": MINE, ".notes.tmp": MINE, ".train-000000.tar.backup.tmp": MINE}
    for name, content in mine.items():
        (out / name).write_bytes(content)
    (out / ".train-000000.tar.0123abcd0123abcd.tmp").write_bytes(b"half a shard of a killed process")
    convert(source, out, options())
    assert contents(out) == reference["tar"] | mine


def test_an_output_path_that_is_a_file_is_rejected(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(MINE)
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "set"):
        with pytest.raises(UserError, match="file: is a file, expected a folder") as caught:
            convert(source, out, options())
        assert caught.value.exit_code == 2


def test_a_conversion_is_not_resumed_with_a_different_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    begin(source, out)
    shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(UserError, match=rf"contains a conversion of {source}, not of {tmp_path}/copy"):
        convert(tmp_path / "copy", out, options())
    with pytest.raises(UserError, match="source of layout 'folder', not 'kaggle'"):
        convert(source, out, Options(shard_bytes=5000, scan=ScanOptions(layout="kaggle", workers=1)))
    (tmp_path / "link").symlink_to(source)
    assert convert(tmp_path / "link", out, options()) is not None


def flip(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "truncated": lambda data: data[: len(data) // 2],
    "nested": lambda data: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-000000.json", "train-000000.rows.npy"])
@pytest.mark.parametrize("form", ["tar", "ffcv"])
def test_a_damaged_record_of_a_shard_is_written_again(
    form: str, name: str, damage: str, *, source: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]]
) -> None:
    out = tmp_path / "set"
    begin(source, out, form)
    path = out / FOLDER / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    convert(source, out, options(form))
    assert contents(out) == reference[form]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-000001.beton", "train-000001.beton.npy"])
@pytest.mark.parametrize("form", ["ffcv", "both"])
def test_a_damaged_record_of_a_beton_is_written_again(
    form: str,
    name: str,
    damage: str,
    *,
    source: Path,
    tmp_path: Path,
    reference: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "set"
    with monkeypatch.context() as ended:
        ended.setattr("shards.convert.join.publish_manifest", None)
        with pytest.raises(TypeError):
            convert(source, out, options(form))
    assert (out / "train.beton").exists()
    path = out / FOLDER / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    convert(source, out, options(form))
    assert contents(out) == reference[form]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["plan.json", "train.rows.npy", "train.names.npy", "train.places.json", "val.bounds.npy"]
)
def test_a_damaged_plan_or_listing_is_reported(name: str, damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    begin(source, out)
    path = out / FOLDER / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for start in (lambda: convert(source, out, options()), lambda: finish(out)):
        with pytest.raises(UserError, match=rf"{name}: damaged; remove the unfinished set {out}, then start again"):
            start()
    path.unlink()
    if name != "plan.json":
        with pytest.raises(UserError, match=f"{name}: damaged"):
            convert(source, out, options())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["tar", "ffcv", "both"])
def test_random_damage_to_an_unfinished_conversion(
    form: str, source: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]]
) -> None:
    """After a flip, truncation, removal or exchange: the same set in the end, or a one-line error."""
    for seed in range(100):
        draw = random.Random(seed)
        out = tmp_path / f"set{seed}"
        begin(source, out, form)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        path, other = draw.choice(files), draw.choice(files)
        match draw.choice(["flip", "truncate", "remove", "exchange"]):
            case "flip" if path.stat().st_size > 10:
                path.write_bytes(flip(path.read_bytes()))
            case "truncate":
                path.write_bytes(path.read_bytes()[: draw.randrange(1 + path.stat().st_size)])
            case "remove":
                path.unlink()
            case "exchange":
                path.write_bytes(other.read_bytes())
        try:
            convert(source, out, options(form))
        except UserError as error:
            assert str(out) in str(error), seed  # noqa: PT017
        else:
            made = contents(out)
            assert made == reference[form] or verify(out, workers=1), seed
        shutil.rmtree(out)


def test_waiting_for_a_listing_names_the_owner_and_times_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.convert.convert, "LISTING_WAIT", 0.3)
    monkeypatch.setattr(shards.files.waiting, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(shards.files.lock, "RETRY_SECONDS", 0.05)
    work = WorkFolder(tmp_path / "set")
    work.create()
    held = pytest.raises(LockHeld, match=f"by process {os.getpid()} on")
    with file_lock(work.path / "scan.lock", "the listing"), held:
        convert(source, work.out, options())
    assert f"in use by process {os.getpid()} on" in capsys.readouterr().err
    with file_lock(work.path / "scan.lock", "the listing") as _:
        pass
    convert(source, work.out, options())


def test_a_wait_for_a_lock_ends_when_it_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.files.lock, "RETRY_SECONDS", 0.01)
    taken, leave = threading.Event(), threading.Event()

    def holder() -> None:
        with file_lock(tmp_path / "x.lock", "it"):
            taken.set()
            leave.wait()

    thread = threading.Thread(target=holder)
    thread.start()
    taken.wait()
    threading.Timer(0.1, leave.set).start()
    with file_lock(tmp_path / "x.lock", "it", wait=60):
        thread.join()


@pytest.mark.timeout(30)
def test_a_fifo_instead_of_a_lock_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.lock")
    with pytest.raises(OSError, match="seek"), file_lock(tmp_path / "x.lock", "it"):
        pass


@pytest.mark.parametrize(
    "owner", [{"host": "a\n[error] b", "pid": 7}, {"host": "x" * 300, "pid": 1}, {"host": 1, "pid": "x"}]
)
def test_the_content_of_a_lock_file_is_validated(owner: dict[str, object], tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    with file_lock(lock, "it"):
        lock.write_text(json.dumps(owner))
        with (
            pytest.raises(LockHeld, match=r"by (process 7 on a\\n\[error\] b|another process)") as caught,
            file_lock(lock, "it"),
        ):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["ffcv", "both"])
def test_a_damaged_tar_is_not_copied_into_the_beton(
    form: str, source: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]]
) -> None:
    """The tar has the recorded size, so the shard counts as finished."""
    out = tmp_path / "set"
    begin(source, out, form)
    tar = min(out.rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[BLOCK + 100] ^= 1  # in the first image
    tar.write_bytes(content)
    with pytest.raises(ConversionFailed, match=f"{tar}: damaged since it was written; remove it"):
        convert(source, out, options(form))
    tar.unlink()
    convert(source, out, options(form))
    assert contents(out) == reference[form]
