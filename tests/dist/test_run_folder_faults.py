"""Complete runs whose disk fills up or whose run folder is damaged: no traceback, and no intact checkpoint is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.run.metrics_file import final_timeline, read_metrics
from tests.dist.trainings import Trainer
from tests.support.disks import fill, small_disk
from tests.support.launching import ROOT, TRAIN, environment
from tests.support.runs import OPTIONS, start, status, wait_for_step


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_ends_the_run_with_a_clear_error(
    train: Trainer, tmp_path: Path, digits: Path, ranks: int
) -> None:
    with small_disk(tmp_path / "disk", "300m") as disk:
        run = disk / "run"
        options = ("--data", digits, "--out", run, "--save-every", "2")
        process = start(tmp_path, *options, ranks=ranks) if ranks > 1 else train.start(*OPTIONS, *options)
        wait_for_step(run, 5, process)
        filler = fill(disk)
        assert process.wait(timeout=240) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert "3 consecutive checkpoints could not be written, the last" in said
        assert "/launch/machine/world.py" not in said  # the launcher has a traceback of its own
        left = status(run)
        assert left["status"] == "failed"
        newest = max(path.name for path in (run / "checkpoints").iterdir())
        assert newest == f"step-{left['step']:08d}"
        filler.unlink()
        done = train(*OPTIONS, *options, "--stop-after", str(left["step"] + 3))
        assert done.returncode == 0, done.stderr
        assert f"resuming from {run / 'checkpoints' / newest}" in done.stderr
        steps = [line["step"] for line in final_timeline(read_metrics(run)) if line["kind"] == "train"]
        # Every step of the resumed run is logged. Later steps may be logged too, from before the failure.
        assert sorted(set(steps) | set(range(1, left["step"] + 4))) == sorted(steps)


def test_a_damaged_run_folder_loses_only_the_damaged_files(train: Trainer, tmp_path: Path, digits: Path) -> None:
    """All files except one intact checkpoint are damaged, and stdout and stderr cannot be written."""
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--save-every", "2")
    done = train(*OPTIONS, *options, "--stop-after", "4")
    assert done.returncode == 0, done.stderr
    # Clone, because `load_file` may map the file, which is damaged below.
    weights = {name: tensor.clone() for name, tensor in load_file(run / "weights-last.safetensors").items()}
    meta = run / "checkpoints" / "step-00000004" / "meta.json"
    meta.write_text(meta.read_text().replace('"step": 4', '"step": 6'))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'17\n{"kind": "train", "step": "x"}\n\xff\n' + bytes(500))
    (run / "recipe.json").write_bytes((run / "recipe.json").read_bytes()[:100])
    (run / "status").write_text('{"status": 5')
    (run / "weights-last.safetensors").write_bytes(b"torn")
    (run / "SAVE").mkdir()
    (run / "curves.png").unlink()
    (run / "curves.png").mkdir()
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" >&- 2>/dev/full', "bash", sys.executable, TRAIN, *OPTIONS]
        + [str(option) for option in (*options, "--stop-after", "4")],
        cwd=ROOT,
        env=environment(tmp_path),
        timeout=280,
        check=False,
    )
    assert done.returncode == 0
    ended = status(run)
    assert (ended["status"], ended["step"], ended["reason"]) == ("finished", 4, "")
    again = load_file(run / "weights-last.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    begun = [line["step"] for line in read_metrics(run) if line["kind"] == "start"]
    assert begun == [0, 2]  # from the older checkpoint, which is intact
    assert json.loads((run / "recipe.json").read_text())["recipe"]["data"]["global_batch"] == 64
