"""The weights files that a run writes with every checkpoint, and how commands find and evaluate them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fat
from launch.class_mapping import map_classes
from launch.evaluate import main as evaluate
from launch.run.progress import WEIGHTS_KINDS, Progress
from launch.run.weights_files import WeightsFiles, best_weights_file, weights_file
from launch.train import main as train
from pipeline.plan import Position
from shards.errors import UserError

SMALL = (
    "--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0",
    "--ema", "0.9", "--crop-pct", "0.9", "--zero", "0",
)  # fmt: skip


def run(main: Callable[[], int], *args: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        return main()


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two steps with an EMA, each of which was evaluated."""
    out = tmp_path_factory.mktemp("run") / "run"
    for step in (1, 2):
        assert run(train, *SMALL, "--data", digits, "--out", out, "--stop-after", step) == 0
    return out


# A step's state contains its number, so that a file tells which step wrote it.
def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"model/w": torch.tensor([float(step)]), "ema/w": torch.tensor([-float(step)]), "exp_avg/w": torch.zeros(1)}


accuracies = st.integers(0, 4).map(lambda number: number / 4)
saves = st.lists(st.tuples(st.none() | st.tuples(accuracies, accuracies), st.booleans()), min_size=1, max_size=8)


@given(saves)
def test_best_files_have_the_first_saved_step_of_the_best_accuracy(
    tmp_path_factory: pytest.TempPathFactory, steps: Sequence[tuple[tuple[float, float] | None, bool]]
) -> None:
    """Each kind has its own best step, and steps without an evaluation change only the last weights.

    Steps whose save failed, for example because the disk was full, are not better than the files.
    """
    folder = tmp_path_factory.mktemp("run")
    files, progress = WeightsFiles(folder, fat.WeightsInfo(model="fat_b0")), Progress()
    for step, (top1, is_saved) in enumerate(steps, 1):
        progress = progress.after(step, Position(0, step))
        if top1 is not None:
            progress = progress.evaluated(dict(zip(WEIGHTS_KINDS, top1, strict=True)))
        if is_saved:
            files.write(state_of(step), progress)
    saved = [(step, top1) for step, (top1, is_saved) in enumerate(steps, 1) if is_saved]
    if not saved:
        return
    scored = dict.fromkeys(WEIGHTS_KINDS, -1.0)
    for index, kind in enumerate(WEIGHTS_KINDS):
        last = fat.read_info(weights_file(folder, "last", kind))
        (last_step, found) = saved[-1]
        assert (last.step, last.ema, last.model) == (last_step, kind == "average", "fat_b0")
        assert last.top1 == (None if found is None else found[index])
        evaluated = [(top1[index], step) for step, top1 in saved if top1 is not None]
        best = weights_file(folder, "best", kind)
        assert best.exists() == bool(evaluated)
        if evaluated:
            scored[kind], step = max(evaluated, key=lambda pair: (pair[0], -pair[1]))
            info = fat.read_info(best)
            assert (info.top1, info.step) == (scored[kind], step)
    expected = weights_file(folder, "best", max(WEIGHTS_KINDS, key=scored.__getitem__))
    assert best_weights_file(folder) == (expected if max(scored.values()) >= 0 else weights_file(folder, "last"))


def test_a_damaged_file_is_replaced_by_the_next_evaluated_weights(tmp_path: Path) -> None:
    weights_file(tmp_path, "best").write_bytes(b"damaged")
    progress = Progress().after(1, Position(0, 1)).evaluated({"weights": 0.0})
    WeightsFiles(tmp_path, fat.WeightsInfo()).write(state_of(1), progress)
    assert fat.read_info(weights_file(tmp_path, "best")).step == 1


def test_a_run_without_weights_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no weights file \(weights-last.safetensors\)"):
        best_weights_file(tmp_path)


def test_a_run_writes_best_and_last_weights_that_describe_themselves(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for kind, line_kind in (("weights", "eval"), ("average", "eval-ema")):
        top1 = {line["step"]: line["top1"] for line in lines if line["kind"] == line_kind}
        for which, step in (("last", 2), ("best", max(top1, key=top1.__getitem__))):
            path = weights_file(trained, which, kind)  # type: ignore[arg-type]
            info = fat.read_info(path)
            assert (info.step, info.ema, info.model) == (step, kind == "average", "fat_b0")
            assert info.top1 == pytest.approx(top1[step], abs=1e-6)
            assert (info.size, info.crop_pct, info.interpolation) == (32, 0.9, "bicubic")
            assert info.mean == pytest.approx((0.485, 0.456, 0.406))
            assert info.recipe is not None
            assert len(info.recipe) == 16
            assert info.version is not None
            assert info.version.startswith("fat-pipeline ")
            assert fat.load_model(path).config == info.config
            assert path.stat().st_mode == (trained / "metrics.jsonl").stat().st_mode  # both follow the umask


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("best", [False, True])
def test_files_and_run_are_evaluated_alike_on_the_data_of_the_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: bool, best: bool
) -> None:
    """Neither --data nor --size is given, and FAT_DATA names another set."""
    monkeypatch.setenv("FAT_DATA", str(tmp_path / "missing"))
    out = tmp_path / "figures.json"
    file = weights_file(trained, "best" if best else "last", "average" if average else "weights")
    file = best_weights_file(trained) if best and not average else file  # the weights or their EMA
    options = [*(["--ema"] if average else []), *(["--best"] if best else [])]
    results = []
    for command in ((trained, *options), (file,)):
        assert run(evaluate, *command, "--json", out) == 0
        results.append(json.loads(out.read_text()))
    info = fat.read_info(file)
    for result in results:
        assert (result["size"], result["crop_pct"], result["ema"]) == (32, 0.9, info.ema)
        assert result["top1"] == pytest.approx(info.top1, abs=1e-6)
    assert results[0]["loss"] == results[1]["loss"]


def test_the_best_weights_of_a_file_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate, weights_file(trained, "last"), "--best") == 2
    error = capsys.readouterr().err
    assert "--best requires a run folder" in error
    assert error.count("\n") == 1


def test_the_state_of_a_checkpoint_is_evaluated_as_the_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = max((trained / "checkpoints").iterdir())
    assert run(evaluate, checkpoint / "state.safetensors", "--batch", "64", "--limit", "64") == 0
    assert f"{checkpoint}, step " in capsys.readouterr().out


def test_weights_that_a_killed_trainer_did_not_write_are_written_by_the_next_start(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    expected = {path.name: path.read_bytes() for path in out.glob("weights*-last.safetensors")}
    for name in expected:
        (out / name).unlink()
    os.truncate(weights_file(out, "best"), 10)
    assert run(train, *SMALL, "--data", digits, "--out", out, "--stop-after", "2") == 0
    found = {path.name: path.read_bytes() for path in out.glob("weights*-last.safetensors")}
    same = {name: _tensors(content) == _tensors(expected[name]) for name, content in found.items()}
    assert same == dict.fromkeys(expected, True)


def _tensors(file: bytes) -> bytes:
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_an_earlier_runs_weights_are_moved_away_with_its_checkpoints(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    """Otherwise its best weights would be taken for those of the new run."""
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    before = {path.name for path in out.glob("weights*")}
    options = (*SMALL, "--data", digits, "--out", out, "--resume", "never", "--stop-after", "1")
    assert run(train, *options) == 0
    assert {path.name for path in (out / "checkpoints-before-1").glob("weights*")} == before
    assert {fat.read_info(path).step for path in out.glob("weights*")} == {1}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_earlier_runs_weights_without_checkpoints_are_moved_away(
    trained: Path, digits: Path, tmp_path: Path, resume: str
) -> None:
    """Checkpoints may have been removed, or moved away by a start that was killed before it moved the weights."""
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    before = {path.name for path in out.glob("weights*")}
    shutil.rmtree(out / "checkpoints")
    options = (*SMALL, "--ema", "0", "--data", digits, "--out", out, "--resume", resume, "--stop-after", "1")
    assert run(train, *options) == 0
    assert {path.name for path in (out / "checkpoints-before-1").glob("weights*")} == before
    assert {path.name for path in out.glob("weights*")} == {"weights-best.safetensors", "weights-last.safetensors"}


@pytest.mark.parametrize(
    ("trained_on", "evaluated_on", "mapped"),
    [
        (("0", "1", "10", "2"), ("0", "1", "10", "2"), None),  # the order of names as text, which conversion uses
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), [0, 1, 3, 2]),
        (("0", "1", "10", "2"), ("10", "2"), [2, 3]),
        (("0", "1", "10", "2"), ("0", "1", "2", "3"), "was not trained on 1 of the 4 classes of set: 3"),
        (("cat", "flower"), ("galaxy", "rocket"), "was not trained on 2 of the 2 classes of set: galaxy, rocket"),
        (("0", "1"), ("00", "01"), "was not trained on 2 of the 2 classes of set: 00, 01"),
    ],
)
def test_classes_are_matched_by_folder_name(
    trained_on: tuple[str, ...], evaluated_on: tuple[str, ...], mapped: list[int] | str | None
) -> None:
    """All classes have the same human-readable name, which does not count."""
    model, data = (fat.ClassList.of(folders, ["crane"] * len(folders)) for folders in (trained_on, evaluated_on))
    if isinstance(mapped, str):
        with pytest.raises(UserError, match=mapped):
            map_classes(model, len(trained_on), data, model=Path("w"), data=Path("set"))
    else:
        found, notes = map_classes(model, len(trained_on), data, model=Path("w"), data=Path("set"))
        assert found == mapped
        assert bool(notes) == (mapped is not None)
