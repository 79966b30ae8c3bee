"""`pipeline index` records notes and warnings about the file names of tars; warnings fail with --strict."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.commands.command_line import Index
from shards.commands.inspect import Info
from shards.errors import ConversionFailed, UserError
from shards.format.manifest import Manifest
from tests.support.sources import labeled_tar

UNNAMED = "b.tar: no split in the name, so used for training"
NO_VALIDATION = "test-0.tar: kept as split 'test'; there is no validation split"
WARNINGS = [
    (["train-0.tar", "b.tar"], f"{UNNAMED}, although train* is named like split 'train'"),
    (["train-0.tar", "training-1.tar"], "train*, training*: merged into split 'train'"),
    (["train-0.tar", "val-0.tar", "validation-0.tar"], "val*, validation*: merged into split 'val'"),
]


def tars(folder: Path, names: list[str]) -> tuple[Path, ...]:
    return tuple(labeled_tar(folder / name, [0, 1, 0]) for name in names)


@pytest.mark.parametrize(("names", "warning"), WARNINGS)
def test_warnings_about_file_names_are_recorded(
    names: list[str], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Index(tars(tmp_path, names), workers=1).run() == 0
    output = capsys.readouterr()
    assert output.err.count(f"warning: {warning}\n") == 1
    assert f"warning: {warning}\n" in output.out, "also in the summary"
    assert Manifest.load(tmp_path).made["warnings"] == [warning]
    assert Info(tmp_path).run() == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert warning in shown


@pytest.mark.parametrize(
    ("names", "note"), [(["b.tar"], UNNAMED), (["train-0.tar", "test-0.tar"], NO_VALIDATION)], ids=["unnamed", "test"]
)
def test_notes_about_file_names_are_recorded_and_pass_with_strict(
    names: list[str], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Index(tars(tmp_path, names), workers=1, strict=True).run() == 0
    output = capsys.readouterr()
    assert f"note: {note}" in output.err
    assert f"note: {note}" in output.out
    made = Manifest.load(tmp_path).made
    assert made["warnings"] == []
    assert [line for line in made["notes"] if line.startswith(note)]
    assert str(tmp_path) not in (tmp_path / "dataset.json").read_text()


@pytest.mark.parametrize(("names", "warning"), WARNINGS)
def test_strict_fails_on_warnings_about_file_names_before_reading_tars(
    names: list[str], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"no tar at all")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        Index(tuple(before), workers=1, strict=True).run()
    assert str(caught.value) == f"{tmp_path}: --strict: {warning}; correct the tars, or omit --strict"
    assert caught.value.exit_code == 2
    assert f"warning: {warning}" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_warnings_about_names_and_labels_are_recorded_together(tmp_path: Path) -> None:
    labeled_tar(tmp_path / "train-0.tar", [0, 3])
    labeled_tar(tmp_path / "b.tar", [0, 3])
    both = tuple(sorted(tmp_path.glob("*.tar")))
    assert Index(both, workers=1).run() == 0
    warnings = Manifest.load(tmp_path).made["warnings"]
    assert [warning.partition(":")[0] for warning in warnings] == ["b.tar", "2 of 4 labels do not occur"]
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "train.index.npy").unlink()
    (tmp_path / "b.tar").rename(tmp_path / "train-1.tar")
    with pytest.raises(ConversionFailed, match="--strict: 2 of 4 labels do not occur"):
        Index(tuple(sorted(tmp_path.glob("*.tar"))), workers=1, strict=True).run()
