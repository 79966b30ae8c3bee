"""An index must match the manifest and have valid rows; later changes of its file have no effect."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cli import main as pipeline
from shards.errors import ShardSetError
from shards.format import index as module
from shards.format.dataset import ShardSet
from shards.format.index import INDEX_DTYPE, Index, index_bytes, write_index
from shards.format.manifest import Manifest
from shards.format.manifest_fields import BetonEntry, ClassEntry, ShardEntry, SplitEntry
from tests.support.damage import edit_index

SAMPLES = (3, 1, 4)
A = "0123456789abcdef"


def rows() -> Index:
    """Return the rows of three shards in files of 1,000 bytes."""
    index = np.zeros(sum(SAMPLES), INDEX_DTYPE)
    index["shard"] = np.repeat([0, 1, 2], SAMPLES)
    index["offset"] = [0, 300, 600, 512, 0, 250, 500, 880]
    index["size"] = 120
    index["label"] = [0, 1, 2, 3, 4, 0, 1, 4]
    index["height"], index["width"], index["orientation"] = 8, 5, 1
    index["hash"] = np.arange(2**63, 2**63 + 8, dtype=np.uint64)
    return index


def write(path: Path, index: Index, beton: str | None = None) -> Path:
    """Write a set with this index; `beton` is the write mode of a set with only a .beton file."""
    shards = np.split(index.copy(), np.cumsum(SAMPLES)[:-1])
    digest = write_index(path / "train.index.npy", len(index), shards)
    names = ["train.beton"] * 3 if beton else ["a.tar", "b.tar", "c.tar"]
    described: Any = {"name": "train.beton", "bytes": 1000, "smart_ratio": 4.0, "segments": (A,) * 3, "mode": beton}
    split = SplitEntry(
        samples=len(index),
        shards=tuple(ShardEntry(name=n, samples=s, bytes=1000, hash=A) for n, s in zip(names, SAMPLES, strict=True)),
        index="train.index.npy",
        index_hash=digest,
        beton=BetonEntry(**described, index="train.index.npy", index_hash=digest) if beton else None,
    )
    Manifest(classes=tuple(ClassEntry(folder=str(i)) for i in range(5)), splits={"train": split}).save(path)
    return path


def test_an_index_is_read_unchanged(tmp_path: Path) -> None:
    assert np.array_equal(ShardSet(write(tmp_path, rows())).index("train"), rows())
    assert np.array_equal(np.load(tmp_path / "train.index.npy"), rows()), "it is an ordinary .npy file"
    assert (tmp_path / "train.index.npy").stat().st_size == index_bytes(len(rows()))


FIELDS = [
    ("shard", 4, 1, "the shard to which the manifest assigns this row"),
    ("shard", 7, 77, "the shard to which the manifest assigns this row"),
    ("label", 2, 5, "less than the number of classes, 5"),
    ("label", 2, 2**32 - 1, "less than the number of classes, 5"),
    ("size", 0, 0, "1 or more, at most 512 MiB and the size of its file"),
    ("size", 0, 1001, "1 or more, at most 512 MiB and the size of its file"),
    ("size", 0, 2**32 - 1, "1 or more, at most 512 MiB and the size of its file"),
    ("offset", 1, 881, "an offset such that the image ends inside its file"),
    ("offset", 1, 2**62, "an offset such that the image ends inside its file"),
    ("offset", 1, 2**64 - 1, "an offset such that the image ends inside its file"),
    ("offset", 1, 2**64 - 120, "an offset such that the image ends inside its file"),
    ("height", 3, 0, "1 to 65,500"),
    ("height", 3, 65_501, "1 to 65,500"),
    ("width", 3, 0, "1 to 65,500"),
    ("orientation", 5, 0, "1 to 8"),
    ("orientation", 5, 9, "1 to 8"),
    ("repaired", 6, 2, "0 or 1"),
]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 14])
@pytest.mark.parametrize("case", FIELDS)
def test_an_invalid_row_is_rejected_even_with_valid_hashes(
    case: tuple[str, int, int, str], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, row, value, expected = case
    monkeypatch.setattr(module, "_CHUNK_ROWS", chunk)
    path = write(tmp_path, rows())
    edit_index(path, lambda index: index[field].__setitem__(row, value))
    with pytest.raises(ShardSetError) as caught:
        ShardSet(path).index("train")
    assert str(caught.value) == (
        f"{path / 'train.index.npy'}: damaged index: row {row} has {field} {value}, expected {expected}; "
        "copy it again, or convert the source again"
    )


def test_a_row_with_too_many_pixels_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, rows())

    def edit(index: Index) -> None:
        index["height"][2], index["width"][2] = 20_000, 20_000

    edit_index(path, edit)
    with pytest.raises(ShardSetError, match=r"row 2 has width 20000, expected at most 100,000,000 pixels in total"):
        ShardSet(path).index("train")


def test_images_of_a_beton_must_not_overlap_and_must_have_the_size_of_their_pixels(tmp_path: Path) -> None:
    index = rows()
    index["offset"] = np.arange(8) * 120
    path = write(tmp_path, index, beton="raw")
    ShardSet(path).index("train", beton=True)
    edit_index(path, lambda found: found["offset"].__setitem__(4, 479))
    with pytest.raises(ShardSetError, match=r"row 4 has offset 479, expected at least the end of the previous image"):
        ShardSet(path).index("train", beton=True)
    edit_index(path, lambda found: found["offset"].__setitem__(4, 480))
    edit_index(path, lambda found: found["width"].__setitem__(1, 4))
    with pytest.raises(ShardSetError, match=r"row 1 has size 120, expected 3 bytes per pixel"):
        ShardSet(path).index("train", beton=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_field_is_rejected_or_valid(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path, rows())
    field = data.draw(st.sampled_from(INDEX_DTYPE.names or ()))
    row, bits = data.draw(st.integers(0, 7)), INDEX_DTYPE[field].itemsize * 8
    value = data.draw(st.integers(0, 2**bits - 1) | st.integers(0, 9))
    unchanged = int(rows()[field][row]) == value
    edit_index(path, lambda index: index[field].__setitem__(row, value), rehash=False)
    if not unchanged:
        with pytest.raises(ShardSetError, match="a different set: expected hash"):
            ShardSet(path).index("train")
    edit_index(path, lambda index: None)
    may_be = {
        "label": value < 5,
        "height": 1 <= value <= 65_500,
        "width": 1 <= value <= 65_500,
        "size": 1 <= value <= 1000 - int(rows()["offset"][row]),
        "offset": value + 120 <= 1000,
        "orientation": 1 <= value <= 8,
        "repaired": value <= 1,
        "hash": True,
        "shard": unchanged,
    }[field]
    if may_be:
        assert ShardSet(path).index("train")[field][row] == value
    else:
        with pytest.raises(ShardSetError, match=f"row {row} has"):
            ShardSet(path).index("train")


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "expected 656 bytes, found 0"),
        (lambda path: os.truncate(path, 655), "expected 656 bytes, found 655"),
        (lambda path: os.truncate(path, 1 << 40), "expected 656 bytes, found 1,099,511,627,776"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
)
def test_every_command_rejects_a_file_that_is_not_an_index(
    damage: Callable[[Path], object], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, rows())
    damage(path / "train.index.npy")
    with pytest.raises(ShardSetError, match=f"train.index.npy: .*{fact}"):
        ShardSet(path).index("train")
    for command, status in (("info", 2), ("look", 2), ("verify", 1)):
        assert pipeline([command, str(path)]) == status
        shown = "".join(capsys.readouterr())
        assert fact in shown
        assert "Traceback" not in shown


def test_an_index_of_another_format_is_rejected_even_with_a_valid_hash(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    content = (path / "train.index.npy").read_bytes().replace(b"'repaired', '|u1'", b"'repaired', '|i1'")
    (path / "train.index.npy").write_bytes(content)
    edit_index(path, lambda index: None)
    with pytest.raises(ShardSetError, match="the index has an unknown format"):
        ShardSet(path).index("train")


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "removed"])
def test_changes_to_the_file_of_an_open_index_have_no_effect(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    index = ShardSet(path).index("train")
    file = path / "train.index.npy"
    if damage == "truncated":
        os.truncate(file, 0)  # a shared memory map would get SIGBUS at the next read
    elif damage == "overwritten":
        with file.open("r+b") as opened:
            opened.write(bytes(index_bytes(8)))
    else:
        file.unlink()
    assert np.array_equal(index, rows())
    with pytest.raises(ValueError, match="read-only"):
        index["label"][0] = 1


def test_a_large_index_is_memory_mapped_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, rows())
    monkeypatch.setattr(module, "PRIVATE_BYTES", 100)
    assert np.array_equal(ShardSet(path).index("train"), rows())
    edit_index(path, lambda index: index["label"].__setitem__(0, 4), rehash=False)
    with pytest.raises(ShardSetError, match="a different set: expected hash"):
        ShardSet(path).index("train")


NO_ACCESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Command prefix that runs as root without the capability to ignore file modes."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop capabilities")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("info", "dataset.json"),
        ("info", "train.index.npy"),
        ("verify", "train.index.npy"),
        ("look", "."),
        ("verify", "."),
    ],
)
def test_a_file_without_read_permission_is_a_storage_failure(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set", rows())
    (path / name).chmod(0)
    code = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "batch.png"
    extra = ["--out", str(out)] if command == "look" else []
    done = subprocess.run(
        [*NO_ACCESS, sys.executable, "-c", code, command, str(path), *extra],
        capture_output=True,
        text=True,
        check=False,
    )
    path.chmod(0o755)
    assert done.returncode == 1
    what = f"{path} is a folder" if name == "." else "a file"
    assert f"Permission denied for user root: {what} of user root, group root, mode 0000" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop capabilities")
def test_verify_reports_every_file_without_read_permission(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    for file in digits.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    for name in ("train-000000.tar", "train-000001.idx", "val.index.npy"):
        (path / name).chmod(0)
    code = "import sys; from shards.commands.verify import verify; print(*verify(sys.argv[1], 1), sep='\\n')"
    code = code.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    done = subprocess.run([*NO_ACCESS, sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    fact = "cannot be read (Permission denied for user root: a file of user root, group root, mode 0000)"
    action = "ask its owner for access (chmod, chgrp), then start again"
    assert sorted(done.stdout.splitlines()) == [
        f"{path / name}: {fact}; {action}" for name in ("train-000000.tar", "train-000001.idx", "val.index.npy")
    ]
