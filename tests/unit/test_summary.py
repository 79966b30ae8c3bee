"""The summary of `pipeline shard` and `pipeline index` accounts for every file of the source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shards.commands.command_line import Index, Shard
from shards.commands.inspect import Info
from tests.support.sources import class_folders, encoded, jpeg, labeled_tar


def mixed(root: Path) -> Path:
    class_folders(root / "train", {"cat [gray]": 3, "dog": 5, "[x]": 1})
    class_folders(root / "val", {"cat [gray]": 2, "dog": 2}, first=50)
    dog = root / "train" / "dog"
    for i in range(2):
        (dog / f"{i}.png").write_bytes(encoded(Image.open(dog / "0.jpg"), "PNG"))
    (dog / "cut.jpg").write_bytes(jpeg(7)[:200])
    (dog / "empty.jpg").write_bytes(b"")
    (dog / "void.jpg").write_bytes(b"")
    (dog / "notes.txt").write_bytes(b"x")
    (root / "val" / "dog" / "Thumbs.db").write_bytes(b"x")
    return root


def test_the_summary_accounts_for_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = mixed(tmp_path / "in"), tmp_path / "set"
    assert Shard(source, out=out, max_rejects=0.5, workers=1).run() == 0
    summary, before = capsys.readouterr()
    warning = "1 class has no validation images: '[x]'"
    assert summary.splitlines() == [
        f"{out}: 11 train + 4 val images of 3 classes, 2 re-encoded, 3 rejected, 2 not used",
        "train: 11 images of 3 classes, 1 to 7 each, in 1 shard",
        "val: 4 images of 2 classes, 2 each, in 1 shard",
        "re-encoded as plain JPEG: 2 train: PNG",
        "rejected: 2 train: empty file (such as dog/empty.jpg)",
        "rejected: 1 train: does not decode: Truncated File Read (such as dog/cut.jpg)",
        f"rejected: all rejects are listed in {out}/rejects.jsonl",
        "not used: 1 Thumbs.db: metadata of a file manager, NAS system, version control, or archive "
        "(such as val/dog/Thumbs.db)",
        "not used: 1 .txt: not an image (such as train/dog/notes.txt)",
        f"warning: {warning}",
    ]
    assert f"warning: {warning}" in before, "also before the conversion"
    assert before.index(warning) < before.index("sharding")
    files = [path for path in source.rglob("*") if path.is_file()]
    assert len(files) == 11 + 4 + 3 + 2


def test_truncated_images_are_one_line_of_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow's reason contains the number of bytes left, which differs between the files."""
    source = class_folders(tmp_path / "in" / "train", {"cat": 3, "dog": 3}).parent
    for number, length in enumerate((len(jpeg(1)) // 2, len(jpeg(1)) * 3 // 4)):
        (source / "train" / "dog" / f"cut{number}.jpg").write_bytes(jpeg(1)[:length])
    Shard(source, out=tmp_path / "set", max_rejects=0.5, workers=1).run()
    rejected = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rejected: 2 train: ")]
    assert len(rejected) == 1, "both for the same reason"
    assert "bytes" not in rejected[0]


def test_indexed_tars_have_the_same_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = labeled_tar(
        tmp_path / "a.tar", [0, 0, 2], {"x.json": b"{}", "7.png": encoded(Image.new("L", (9, 9)), "PNG"), "7.cls": b"0"}
    )
    assert Index((tar,), max_rejects=0.5, workers=1).run() == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 3 train images of 3 classes, 0 re-encoded, 1 rejected, 1 not used",
        "train: 3 images of 2 classes, 1 to 2 each, in 1 shard",
        "train: in the order of the tars, where runs of one class have a mean length of 1.5",
        "rejected: 1 train: PNG: 'pipeline shard' re-encodes such images, but 'pipeline index' cannot "
        "(such as a.tar/7.png)",
        f"rejected: all rejects are listed in {tmp_path}/rejects.jsonl",
        "not used: 1 .json: not part of a sample (such as a.tar/x.json)",
        "note: a.tar: no split in the name, so used for training",
        "warning: 1 of 3 labels do not occur: 1",
    ]


def test_long_lists_of_reasons_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "in", {"a": 2, "b": 2})
    for kind in range(14):
        for i in range(1 + kind):
            (source / "a" / f"{i}.kind{kind}").write_bytes(b"x")
    Shard(source, out=tmp_path / "set", workers=1).run()
    unused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not used: ")]
    assert len(unused) == 11
    assert unused[0].startswith("not used: 14 .kind13: ")
    assert unused[-1] == "not used: for 4 more reasons (see dataset.json)"


def test_the_summary_is_not_wrapped_in_a_pipe(tmp_path: Path) -> None:
    """Lines are neither wrapped at the terminal width nor colored, even if a path looks like markup."""
    source = class_folders(tmp_path / "in [bold]" / ("n" * 120), {"a": 2, "b": 2})
    shown = subprocess.run(
        [sys.executable, "-m", "launch.cli", "shard", source, "--out", tmp_path / "set [/bold]", "--workers", "1"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "20", "FORCE_COLOR": "1", "PYTHONPATH": "."},
    ).stdout  # fmt: skip
    assert shown.splitlines() == [
        f"{tmp_path}/set [/bold]: 4 train images of 2 classes, 0 re-encoded, 0 rejected",
        "train: 4 images of 2 classes, 2 each, in 1 shard",
    ]


def test_info_shows_notes_warnings_and_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "in", {str(c): 1 for c in (0, 1, 2, 10, 4, 5, 6, 7, 8, 9)})
    (source / "0" / "list.csv").write_bytes(b"x")
    Shard(source, out=tmp_path / "set", workers=1).run()
    capsys.readouterr()
    Info(tmp_path / "set").run()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "note the names of the 10 class folders are numbers" in shown
    assert "warning class folders are numbered 0 to 10, without 3" in shown
    assert "(such as 0/list.csv)" in shown
