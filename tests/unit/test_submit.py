"""Options and rendered scripts of `launch.submit`, without a cluster. tests/slurm tests them with one."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.config.command_line import parse
from launch.slurm.job import Submit, SubmitError, fits, seconds_of
from launch.slurm.script import END_OF_SETTINGS, TEMPLATE, render
from launch.submit import main

SLURM = TEMPLATE.parent


@pytest.mark.parametrize(
    ("nodes", "per_node", "options", "expected"),
    [
        ("1-4", 8, (), [(1, 1, 8), (2, 2, 8), (3, 2, 8), (4, 4, 8)]),
        ("3", 8, ("--global-batch", "96"), [(3, 3, 8)]),
        # 28 ranks do not divide 96 rows; 24 ranks do, as 2 nodes x 12 processes (not as 3 x 8)
        ("2", 14, ("--global-batch", "96", "--mixup", "0", "--cutmix", "0"), None),
        ("1-2", 14, ("--global-batch", "96", "--mixup", "0", "--cutmix", "0"), [(1, 1, 12), (2, 2, 12)]),
        ("1-2", 8, ("--global-batch", "1024", "--micro-batch", "128"), [(1, 1, 8), (2, 1, 8)]),
    ],
)
def test_the_largest_world_size_that_the_global_batch_allows(
    nodes: str, per_node: int, options: tuple[str, ...], expected: list[tuple[int, int, int]] | None
) -> None:
    job, recipe = Submit(nodes=nodes, gpus_per_node=per_node), parse(options)
    if expected is None:
        with pytest.raises(SubmitError, match="nearest world sizes that do: 24 and 32"):
            fits(recipe, job)
    else:
        assert fits(recipe, job) == expected


def test_a_rendered_script_differs_from_the_template_only_in_its_head(tmp_path: Path) -> None:
    training = ["--variant", "b3", "--data", "a set", "--out", str(tmp_path / "it's")]
    job = Submit(nodes="2", partition="gpu", time="1:00:00", account="me", sbatch=("--qos=high",))
    script = render(job, parse(training), training)
    body = TEMPLATE.read_text().partition(END_OF_SETTINGS)[2]
    assert script.endswith(END_OF_SETTINGS + body)
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert {"--partition=gpu", "--time=1:00:00", "--account=me", "--qos=high", "--exclusive", "--requeue"} < set(
        options
    )
    assert {"--nodes=2", "--gpus-per-node=8", "--signal=B:USR2@180"} < set(options)
    head = script.partition(END_OF_SETTINGS)[0]
    program = head + '\nprintf "%s\\n" "$RUN" "${ARGS[@]}"'
    shown = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == [str(tmp_path / "it's"), *training]


@pytest.mark.parametrize(
    ("container", "srun", "command"),
    [
        ("fat.sif", "SRUN=()", "EXEC=(apptainer exec --nv --pwd "),
        ("nvcr.io#nvidia/pytorch:25.01", "SRUN=('--container-image=nvcr.io#nvidia/pytorch:25.01'", "EXEC=()"),
    ],
)
@pytest.mark.parametrize("resume", ["/scratch/runs/other", "/scratch/runs/other/checkpoints/step-00000010"])
def test_container_options(container: str, srun: str, command: str, resume: str) -> None:
    training = ["--data", "/scratch/set", "--resume", resume]
    lines = render(Submit(container=container, mount=("/opt",)), parse(training), training).splitlines()
    assert any(line.startswith(srun) for line in lines)
    assert any(line.startswith(command) for line in lines)
    assert any("/scratch/set:/scratch/set" in line and "/opt:/opt" in line for line in lines)
    assert any("/scratch/runs/other:/scratch/runs/other" in line for line in lines)
    assert "PYTHON=python3" in lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nodes", "0"), "--nodes 0: expected a number such as 4, or a range such as 2-8, of at most 10,000 nodes"),
        (("--nodes", "4-2"), "--nodes 4-2"),
        (("--gpus-per-node", "0"), "at least one process per node"),
        (("--nodes", "5"), "--nodes 5 x 8 processes: world size 40 does not divide"),
        (("--", "--epochs", "0"), "--epochs 0: expected a whole number from 1 to 1,000,000"),
        (
            ("--time", "nonsense"),
            "--time nonsense: expected a time as in sbatch, such as 24:00:00 or 2-12 (days-hours)",
        ),
        (
            ("--time", "3"),
            "--time 3: with --warn-seconds 180, the job would be told to stop at its start; use a longer time, or "
            "fewer --warn-seconds",
        ),
        (("--time", "4", "--", "--preempt-margin", "240"), "--time 4: with --preempt-margin 240 (seconds), training"),
        (("--data", "set"), "--data: a training option; write training options after --"),
        (("--", "--nodes", "2"), "--nodes: an option of the job, not of training; write it before --"),
        (("--", "--zero", "3", "--compile", "default"), "--compile default: torch.compile does not support ZeRO 3"),
    ],
)
def test_invalid_options_are_rejected_before_submission(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("10", 600), ("10:30", 630), ("1:00:00", 3600), ("2-12", 216000), ("2-12:30", 217800), ("1-0:0:5", 86405),
        ("unlimited", math.inf), ("INFINITE", math.inf), ("0", math.inf),
    ],
)  # fmt: skip
def test_time_limits_have_the_units_of_sbatch(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "{none}"), "{none}: no such shard set"),
        (("--data", "{set}", "--global-batch", "2048"), "1437 training images are fewer than one global batch of 2048"),
        (("--data", "{set}", "--global-batch", "64", "--weights", "{none}"), "--weights {none}: No such file"),
        (("--data", "{set}", "--global-batch", "64", "--size", "32", "--teacher", "{none}"), "--teacher {none}: "),
        (("--data", "{set}", "--global-batch", "64", "--classes", "3"), "--classes 3: the data set has 10 classes"),
        (("--data", "{set}", "--global-batch", "64", "--classes-subset", "eleven"), "--classes-subset"),
        (("--data", "{set}", "--global-batch", "64", "--size", "32"), ""),
        (("--data", "http://127.0.0.1:9/set", "--global-batch", "64"), ""),  # not opened
    ],
)
def test_submission_warns_of_files_that_the_job_cannot_use(
    digits: Path, tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"set": digits, "none": tmp_path / "none"}
    arguments = [option.format(**names) for option in options]
    assert main(["--dry-run", "--", "--out", str(tmp_path / "run"), *arguments]) == 0
    shown = capsys.readouterr().err
    assert message.format(**names) in shown
    assert shown.startswith("warning: the job fails unless its nodes have other files: " if message else "")
    assert shown.count("\n") == bool(message)


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_run_folder_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["--", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "the run folder cannot be written" in capsys.readouterr().err


def test_a_full_disk_has_its_own_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("launch.submit.durable_write", full)
    assert main(["--", "--out", str(tmp_path / "run")]) == 1
    assert "the run folder cannot be written (No space left on device); free disk space" in capsys.readouterr().err


def test_without_sbatch_the_script_is_written_for_submission_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--", "--out", str(tmp_path / "run")]) == 2
    assert f"on a login node run: sbatch {tmp_path / 'run' / 'slurm' / 'train.sbatch'}" in capsys.readouterr().err
    assert (tmp_path / "run" / "slurm" / "train.sbatch").is_file()


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_templates_are_valid_shell(script: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_repeated_options_accumulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "1", "--dry-run", "--sbatch=--qos=high", "--sbatch=--constraint=h100"]
    assert main([*options, "--", "--variant", "b0", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --qos=high\n" in shown
    assert "#SBATCH --constraint=h100\n" in shown


@pytest.mark.parametrize(
    ("resume", "status", "message"),
    [
        ("step:x", 2, "error: --resume step:x: expected the number of an optimizer step"),
        ("step:5", 0, "warning: the job fails unless its nodes have other files: --resume step:5: "),
        ("runs/none", 0, "other files: --resume runs/none: no such folder"),
    ],
)
def test_the_checkpoint_to_resume_from_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str, status: int, message: str
) -> None:
    assert main(["--dry-run", "--", "--out", str(tmp_path / "run"), "--resume", resume]) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert status or f"--resume {resume}" in shown.out
