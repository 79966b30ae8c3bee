"""Output of the commands: names are printed literally, output paths are checked first, files are written atomically."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fat
from fat.config import VARIANTS
from launch.bench.chart import write_chart
from launch.bench.verdict import Figures, Phase
from launch.cli import main as pipeline
from launch.evaluate import main as evaluate
from launch.evaluate import show
from launch.machine.device_peaks import DevicePeaks
from launch.monitor.metrics import Display
from launch.monitor.roofline import Roofline
from launch.run.checkpoint import Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from launch.train import main as train
from shards.errors import StorageFailed
from shards.files.output import OutputError, check_output, write_output
from tests.support.damage import edit_manifest

MARKUP = "[/red] [bold]x[/] $x_{y}$"
LOOK = ("look", "--size", "32", "--count", "2", "--augment", "none")


def run(main: Callable[[], int], *args: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        return main()


# -- names are printed literally ---------------------------------------------------------------------------------


@pytest.fixture
def odd(digits: Path, tmp_path: Path) -> Path:
    """The digits set with class names and a folder name that look like markup."""
    folder = Path(shutil.copytree(digits, tmp_path / "[red]set[/red]"))

    def edit(manifest: dict[str, Any]) -> None:
        for entry in manifest["classes"]:
            entry["name"] = MARKUP
        manifest["made"]["source"] = MARKUP

    edit_manifest(folder, edit)
    return folder


def test_info_prints_brackets_literally(
    odd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert pipeline(["info", str(odd)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(MARKUP) == 11
    assert "[red]set[/red]" in shown.replace("\n", "")


def test_dry_run_prints_brackets_literally(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    out = tmp_path / "[/red]"
    small = ("--size", "32", "--global-batch", "32", "--augment", "light")
    assert run(train, *small, "--data", odd, "--out", out, "--dry-run") == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert "[red]set[/red]" in shown
    assert f"norunin{out}hasmeasured" in shown  # without spaces, because the table wraps lines


def test_class_names_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    odd = (MARKUP, "a\nb\x1b[31m")
    classes = {name: {"name": name[::-1], "top1": 0.5, "samples": 2} for name in odd}
    pairs = [{"label": MARKUP, "prediction": "output 7", "count": 2}]
    show({"top1": 0.5, "top5": 1.0, "loss": 1.0, "samples": 4, "classes": classes, "confusions": pairs})
    shown = capsys.readouterr().out
    for text in (MARKUP, MARKUP[::-1], r"a\nb\x1b[31m", r"m13[\x1bb\na"):
        assert text in shown


def test_log_lines_are_printed_literally_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(enabled=True)
    display.print(f"{MARKUP} a\nb")
    assert capsys.readouterr().err.endswith(f" {MARKUP} a\\nb\n")


def test_device_name_is_no_formula_in_the_chart(tmp_path: Path) -> None:
    phase = Phase(rate=1.0, cpu=1.0, waiting=0.0)
    roofline = Roofline(1, 1, DevicePeaks(arithmetic=1.0, stated=True, bandwidth=1.0))
    machine = {"device": r"GPU $\frac$", "cores": 1, "load": 0}
    settings = {"model": "fat_b0", "batch": 1}
    figures = Figures(
        machine=machine, settings=settings, reading=1.0, decoding=1.0, decode_paths={}, loader=phase, model=phase,
        both=phase, predicted=1.0, roofline=roofline, memory={},
    )  # fmt: skip
    write_chart(figures, tmp_path / "chart.svg")
    assert r"GPU $\frac$" in (tmp_path / "chart.svg").read_text()
    assert os.listdir(tmp_path) == ["chart.svg"]


# -- output files ------------------------------------------------------------------------------------------------


def bad_outputs(tmp_path: Path, suffix: str) -> dict[Path, str]:
    (tmp_path / f"folder{suffix}").mkdir()
    return {
        tmp_path / f"folder{suffix}": "is a folder",
        tmp_path / "none" / f"x{suffix}": "there is no folder",
        tmp_path / f"{'x' * 300}{suffix}": "File name too long",
    }


@pytest.mark.parametrize("command", ["look", "bench", "evaluate", "report"])
def test_unwritable_output_is_rejected_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Set and weights do not exist, but the error is that of the output path, which is checked first."""
    none = tmp_path / "no-set"
    for path, fact in bad_outputs(tmp_path, ".html" if command == "report" else ".png").items():
        arguments: dict[str, tuple[Any, ...]] = {
            "look": ("look", none, "--out", path),
            "bench": ("bench", none, "--chart", path),
            "evaluate": ("w.safetensors", "--data", none, "--json", path),
            "report": ("report", none, "--out", path),
        }
        if command == "evaluate":
            assert run(evaluate, *arguments[command]) == 2
        else:
            assert pipeline([*map(str, arguments[command])]) == 2
        shown = capsys.readouterr().err
        assert fact in shown
        assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("look", "SET", "--out", "x.xyz"),
        ("bench", "SET", "--chart", "x.xyz"),
        ("report", "RUN", "--out", "x.xyz"),
        ("report", "RUN", "--png", "x.xyz"),
    ],
    ids=" ".join,
)
def test_unknown_figure_format_is_rejected(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(list(arguments)) == 2
    assert "x.xyz: expected a file name that ends in" in capsys.readouterr().err


def test_output_folder_without_permission_is_rejected(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    program = (
        "from pathlib import Path; from shards.files.output import check_output; from shards.errors import UserError\n"
        "try: check_output(Path('x.png'), '--out')\n"
        "except UserError as error: print(error)"
    )
    user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*user, sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "--out x.png: no permission to write to it; specify another file\n", done.stderr


def test_figure_replaces_the_old_file_atomically(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"old")
    assert pipeline([*LOOK[:1], str(digits), *LOOK[1:], "--out", str(out)]) == 0
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFailed), (errno.EACCES, OutputError)])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    out = tmp_path / "x.json"
    write_output(out, b"old", "--json")

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("shards.files.durable.write_all", fails)
    with pytest.raises(kind, match=f"--json {out}: cannot be written"):
        write_output(out, b"new", "--json")
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_symlinks_and_devices_are_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    check_output(link, "--out")
    write_output(link, b"x", "--out")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"x")
    check_output(Path(os.devnull), "--out")
    write_output(Path(os.devnull), b"x", "--out")
    assert Path(os.devnull).is_char_device()


# -- evaluation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint and weights of FAT-B0 for ten classes."""
    torch.manual_seed(0)
    model = fat.create_model("fat_b0", num_classes=10)
    run = tmp_path_factory.mktemp("run")
    state = {f"model/{name}": value for name, value in model.state_dict().items()}
    info = fat.WeightsInfo(config=model.config, size=32, crop_pct=0.9)
    folder = CheckpointFolder(run / "checkpoints", keep=1, info=info)
    folder.save(state, Progress(step=1, epoch_step=1), Fingerprint({}, {}))
    fat.save_weights(model, run / "weights-last.safetensors")
    return run


EVALUATE = ("--size", "32", "--limit", "4", "--batch", "4")


def test_run_folder_is_evaluated(finished: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate, finished, "--data", digits, *EVALUATE) == 0
    assert "over 4 images" in capsys.readouterr().out


def test_checkpoint_that_does_not_match_its_header_is_rejected(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = CheckpointFolder(finished / "checkpoints").newest()
    assert found is not None
    other = fat.WeightsInfo(config=VARIANTS["fat_b1"], size=32, crop_pct=0.9)
    no_dimensions = "does not record the model's dimensions"
    for info, fact in ((other, "do not match the model dimensions in its header"), (fat.WeightsInfo(), no_dimensions)):
        CheckpointFolder(tmp_path, info=info).save(found.load(), found.progress, found.fingerprint)
        assert run(evaluate, tmp_path / found.path.name, "--data", digits, *EVALUATE) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {tmp_path / found.path.name}: ")
        assert fact in shown
        assert shown.count("\n") == 1


def test_invalid_models_are_rejected_in_one_line(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "empty", tmp_path / "none", tmp_path / "other.safetensors", digits / "manifest.json"):
        assert run(evaluate, path, "--data", digits, *EVALUATE) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
    assert run(evaluate, finished, "--data", digits, "--split", "[nope]") == 2
    assert "no split '[nope]'" in capsys.readouterr().err
    file = finished / "weights-last.safetensors"
    assert run(evaluate, file, "--data", digits, "--batch", "65536", "--size", "8192") == 2
    assert "--batch 65536, --size 8192: needs at least 49,152.0 GiB" in capsys.readouterr().err
