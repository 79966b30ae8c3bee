"""Conventions of all commands: --version, misspelled names, closed and full outputs, ASCII terminals, progress."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shards.progress
from launch.cli import SAMPLES, SUBCOMMANDS, Sample
from launch.cli import main as pipeline
from launch.config.command_line import MAX_BYTES, parse
from launch.submit import main as submit
from shards.command import CLOSED_PIPE, option_names, project_version
from shards.errors import UserError
from shards.progress import Phases, Progress, duration

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ("-m", "launch.cli")
COMMANDS = {
    "pipeline": PIPELINE,
    "train": ("launch/train.py",),
    "evaluate": ("launch/evaluate.py",),
    "submit": ("-m", "launch.submit"),
    "table": ("-m", "fat.account.table"),
    "roofline": ("-m", "fat.account.roofline"),
    "prefill": ("-m", "fat.kernels.prefill"),
}
OFTEN_USED = ("pipeline", "train", "evaluate")
every_command = pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN_USED)) for name in COMMANDS]
)


def start(
    *args: str, stdout: int | io.IOBase = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the project's folder."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


# -- all commands ------------------------------------------------------------------------------------------------------


@every_command
def test_version_is_printed_on_one_line(command: str) -> None:
    done = start(*COMMANDS[command], "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fat")
    assert "torch 2" in done.stdout
    assert done.stdout.count("\n") == 1


def test_version_of_a_checkout_is_that_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.command.PROJECT", "no-such-package")
    assert f'version = "{project_version()}"' in (ROOT / "pyproject.toml").read_text()


@every_command
def test_unknown_option_is_invalid_input_without_traceback(command: str) -> None:
    done = start(*COMMANDS[command], "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@every_command
def test_help_has_no_control_codes_in_a_file_and_no_repeated_none(command: str) -> None:
    done = start(*COMMANDS[command], "--help", FORCE_COLOR="1")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "(default: None)" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "prefill"])
@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_a_reader_that_has_exited_ends_a_command_quietly(command: str, arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = start(*COMMANDS[command], *arguments, stdout=closed)
    # Training discards output that cannot be written, because it must not end when the reader of its log does.
    expected = {"train": 0, "table": -signal.SIGPIPE, "roofline": -signal.SIGPIPE}
    assert (done.returncode, done.stderr) == (expected.get(command, CLOSED_PIPE), "")


@pytest.mark.parametrize("device", ["/dev/full", "closed pipe"])
def test_info_whose_output_cannot_be_written(digits: Path, device: str) -> None:
    if device == "/dev/full":
        with open(device, "wb") as full:
            done = start(*PIPELINE, "info", str(digits), stdout=full)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the output cannot be written (No space left on device)")
        assert done.stderr.count("\n") == 1
        return
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = start(*PIPELINE, "info", str(digits), stdout=closed)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


@pytest.mark.parametrize(
    "arguments",
    [
        "-m launch.cli info /no-such-set",
        "launch/evaluate.py /no-such-model --data /no-such-set",
        "-m launch.submit --nodes 0",
        "launch/train.py --data /no-such-set",
    ],
)
def test_errors_of_a_command_without_stderr_do_not_reach_stdout(arguments: str) -> None:
    command = ["sh", "-c", f'"$0" {arguments} 2>&-', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


# -- misspelled names --------------------------------------------------------------------------------------------------

MISSPELLED = [
    (("shrad", "x"), "shrad: no such subcommand of 'pipeline'; did you mean shard?"),
    (("sample", "digts", "x"), "digts: no such subcommand of 'pipeline sample'; did you mean digits?"),
    (("info", "--set-digst", "x", "SET"), "--set-digst: no such option of 'pipeline info'; did you mean --set-digest?"),
    (("shard", "--hlp"), "--hlp: no such option of 'pipeline shard'; did you mean --help?"),
    (("sample", "photos", "x", "--coutn", "3"), "did you mean --count?"),
    (("bench", "SET", "--variant", "b3"), "write training options after --: pipeline bench SET -- --variant b3"),
    (("tune", "SET", "--recipe", "x"), "write training options after --: pipeline tune SET -- --variant b3"),
    (("bench", "SET", "--", "--steps", "3"), "--steps: an option of the command, not of training"),
    (("bench", "SET", "--", "--varaint", "b0"), "did you mean --variant?"),
    (("info", "SET", "--", "--x"), "only 'train', 'race', 'bench' and 'tune' accept training options after --"),
]


@pytest.mark.parametrize(("arguments", "message"), MISSPELLED, ids=[" ".join(args) for args, _ in MISSPELLED])
def test_misspelled_names_are_explained_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(list(arguments)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_misspelled_training_options_are_explained() -> None:
    with pytest.raises(UserError, match=r"--varaint: no such option of 'launch/train.py'; did you mean --variant\?"):
        parse(["--varaint", "b0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "SET"], "--data: a training option; write training options after --"),
        (["--", "--nodes", "4"], "--nodes: an option of the job, not of training; write it before --"),
        (["--nodse", "4"], "did you mean --nodes?"),
    ],
)
def test_misplaced_options_of_a_job_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SUBCOMMANDS, *SAMPLES])
def test_known_options_are_those_of_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option in the help is accepted by the check of names."""
    kind = SAMPLES.get(name) or SUBCOMMANDS[name]
    if kind is Sample:
        return
    with pytest.raises(SystemExit):
        pipeline([*(("sample",) if name in SAMPLES else ()), name, "--help"])
    shown = capsys.readouterr().out
    listed = set(re.findall(r"^\W*(--[a-z][\w-]+)", shown, re.MULTILINE)) | set(re.findall(r", (--no-[\w-]+)", shown))
    listed -= {"--help"}
    assert listed <= option_names(kind)  # type: ignore[arg-type]
    assert bool(listed) is (name not in ("digits", "recipes"))


# -- contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["40", "80"])
def test_info_fits_an_ascii_terminal(digits: Path, columns: str) -> None:
    done = start(*PIPELINE, "info", str(digits), PYTHONIOENCODING="ascii", COLUMNS=columns)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert any("| ###" in line for line in lines)
    assert "\\u" not in done.stdout


def test_info_has_units_and_omits_unset_options(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["info", str(digits), "--classes", "3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"shard_bytes\W+[\d.]+ MiB", shown)
    assert "None" not in shown
    assert "7 more" in shown
    assert "2_two" in shown
    assert "3_three" not in shown
    assert pipeline(["info", str(digits), "--classes", "0"]) == 0
    assert "9_nine" in capsys.readouterr().out


def test_json_replaces_the_text_on_standard_output(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["info", str(digits), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: split["images"] for name, split in found["splits"].items()} == {"train": 1437, "val": 360}
    assert sum(entry["images"]["train"] for entry in found["classes"]) == 1437
    assert pipeline(["verify", str(digits), "--json", "-", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(digits), "faults": []}


@pytest.mark.parametrize("command", ["info", "verify"])
def test_unwritable_json_is_rejected_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline([command, str(tmp_path / "no-set"), "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_found_by_name() -> None:
    assert parse(["--recipe", "digits"]) == parse(["--recipe", str(ROOT / "launch/recipes/digits.toml")])
    with pytest.raises(UserError, match=r"digit: no such recipe file; did you mean digits\?"):
        parse(["--recipe", "digit"])


def test_recipe_of_a_run_is_used_without_its_run_folder(tmp_path: Path) -> None:
    saved = parse(["--size", "64", "--epochs", "7", "--warmup-epochs", "1", "--out", "runs/a", "--lr", "1e-3"])
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"recipe": saved.to_dict(), "engine": {}}))
    found = parse(["--recipe", str(file), "--lr", "2e-3"])
    assert (found.data.size, found.optim.epochs, found.optim.lr) == (64, 7, 2e-3)
    assert found.run.out == parse([]).run.out
    for content in ("[]", "{}", '{"recipe": 3}', "{"):
        file.write_text(content)
        with pytest.raises(UserError, match="not a readable JSON file"):
            parse(["--recipe", str(file)])
    with pytest.raises(UserError, match=r"is a folder; specify a file in it, such as a run's recipe\.json"):
        parse(["--recipe", str(tmp_path)])


def test_shipped_recipes_are_found_beside_folders_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert parse(["--recipe", "digits"]).optim.epochs == 18


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_recipes_that_are_no_files_are_rejected(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a fifo; use a file of options"):
        parse(["--recipe", str(tmp_path / name)])
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=r"1,048,577 bytes, more than the 1,048,576 bytes that are allowed; use a TOML"):
        parse(["--recipe", str(tmp_path / name)])


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_in_a_file_is_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shards.progress, "LOG_EVERY", 0.0)
    with Progress("evaluating", 10) as progress:
        progress.update(4)
        progress.update(10, 10**9)
    with Progress("evaluating", 10, shown=False) as hidden:
        hidden.update(10)
    with Phases("bench", 2) as phases:
        phases.begin("building the model")
        phases.note("a note")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        "evaluating: 4 of 10 images",
        "evaluating: 10 of 10 images",
        "evaluating: 10 of 10 images",
        "bench: 1 of 2",
        "a note",
    ]
    assert lines[0].endswith(" left")
    assert "MB/s" not in lines[0]
    assert "MB/s" in lines[1]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_live_line_is_never_wrapped(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("verifying", 1_281_167) as progress:
        progress.update(640_000, 70_000_000_000)
    with Phases("bench", 14) as phases:
        phases.begin(f"a long name of a phase {'x' * 80}")
    assert "\x1b" in screen.getvalue()
    # Every refresh redraws one line; a wrapped line would end in a line feed before the next refresh.
    lines = [line for part in screen.getvalue().split("\r") for line in part.split("\n") if "verifying" in line]
    assert lines
    assert screen.getvalue().count("\n") <= 3


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    with Phases("bench") as phases, Progress("verifying", 3) as progress:
        phases.begin("building the model")
        progress.update(3)
    assert "\x1b" not in screen.getvalue()
    assert screen.getvalue().startswith("bench: building the model\nverifying: 3 of 3 images")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (38, "38 s"),
        (59.7, "0:01:00"),
        (725, "0:12:05"),
        (11220, "3:07:00"),
        (86399.6, "1 d 00:00:00"),
        (187_205, "2 d 04:00:05"),
    ],
)
def test_durations_are_readable(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_script_is_written(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    done = start(*PIPELINE, "--tyro-write-completion", shell, str(script))
    assert done.returncode == 0, done.stderr
    assert "--set-digest" in script.read_text()


def test_bash_completes_subcommands_and_options(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    assert start(*PIPELINE, "--tyro-write-completion", "bash", str(script)).returncode == 0
    program = (
        f"source {script}; complete -p pipeline >/dev/null || exit 9\n"
        "name=$(complete -p pipeline | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $name pipeline "${@: -1}"; '
        'echo "${COMPREPLY[*]}"; }\n'
        "try pipeline sh; try pipeline info --set"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "pipeline").write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m launch.cli "$@"\n')
    (tmp_path / "pipeline").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", program], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["shard", "--set-digest"], done.stderr
