"""A password in a URL appears neither in the output of a command nor in a file that it writes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main as pipeline
from launch.config.recipe import Recipe
from launch.evaluate import main as evaluate
from launch.machine.provenance import git_state, versions
from launch.monitor.trackers import Trackers
from launch.run.saved_recipe import read_saved_run
from launch.run.status import STATUS_NAME, write_status
from launch.submit import main as submit
from launch.train import main as train
from shards import redact as redaction
from shards.errors import UserError, report
from shards.redact import printable, protect_output, redact, redacted, redacted_traceback
from tests.support.serving import serve
from tests.support.tracker_readers import EVERY_TRACKER, keep_on_this_machine, library_of

CANARY = "canary7f3a"
URL = f"https://me:{CANARY}@host/set"
SIGNED = f"https://host/set?X-Amz-Signature={CANARY}"


@pytest.fixture
def restore_hooks() -> Iterator[None]:
    """Restore the hooks of this process after each test."""
    hooks = sys.excepthook, logging.getLogRecordFactory(), warnings.formatwarning
    yield
    sys.excepthook, warnings.formatwarning = hooks[0], hooks[2]
    logging.setLogRecordFactory(hooks[1])


def found_in(folder: Path) -> list[Path]:
    """Return the files whose name or content contains the password."""
    return [
        path
        for path in folder.rglob("*")
        if CANARY in str(path.relative_to(folder)) or (path.is_file() and CANARY.encode() in path.read_bytes())
    ]


# -- every command -----------------------------------------------------------------------------------------------

TRAIN = ("--size", "32", "--augment", "light", "--global-batch", "16", "--epochs", "1", "--warmup-epochs", "0")
STEPS = ("--stop-after", "2", "--log-every", "1", "--tracker", "tensorboard", "--read-threads", "2")
BENCH = ("--steps", "1", "--json", "b.json", "--chart", "b.png", "--", "--size", "32", "--global-batch", "4")
COMMANDS: dict[str, tuple[Callable[[], int], tuple[str, ...]]] = {
    "train": (train, (*TRAIN, *STEPS, "--data", "URL", "--out", "run")),
    "dry run": (train, (*TRAIN, "--data", "URL", "--out", "run", "--dry-run")),
    "train on a missing set": (train, (*TRAIN, "--data", "NOTHING", "--out", "run")),
    "evaluate": (evaluate, ("none.safetensors", "--data", "URL")),
    "submit": (submit, ("--", "--data", "URL", "--out", "run")),
    "look": (pipeline, ("look", "URL", "--size", "32", "--count", "4", "--out", "look.png")),
    "look at a missing set": (pipeline, ("look", "NOTHING", "--size", "32", "--out", "look.png")),
    "bench": (pipeline, ("bench", "URL", *BENCH)),
    "tune on a missing set": (pipeline, ("tune", "NOTHING")),
    "info": (pipeline, ("info", "URL")),
    "verify": (pipeline, ("verify", "URL")),
}
SLOW = ("bench",)


@pytest.mark.usefixtures("restore_hooks")
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS]
)
def test_no_command_prints_or_saves_a_password(
    command: str, tmp_path: Path, digits: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, args = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAT_CACHE", str(tmp_path / "cache"))
    with serve(digits) as site:
        url = site.url.replace("://", f"://me:{CANARY}@")
        urls = {"URL": url, "NOTHING": f"{url}/none"}
        monkeypatch.setattr(sys, "argv", ["command", *(urls.get(arg, arg) for arg in args)])
        assert main() in (0, 1, 2)
    shown = "".join(capfd.readouterr())
    assert shown
    assert CANARY not in shown
    assert "Traceback" not in shown
    assert found_in(tmp_path) == []


# -- every function that writes text -------------------------------------------------------------------------------


def recipe(tracker: str = "tensorboard") -> Recipe:
    base = Recipe()
    return replace(
        base,
        data=replace(base.data, cache=Path(URL)),
        run=replace(base.run, out=Path(URL)),
        log=replace(base.log, tracker=(tracker,)),
    )


def test_a_recipe_is_saved_without_passwords() -> None:
    saved = json.dumps(recipe().to_dict())
    assert CANARY not in saved
    assert "https:/***@host/set" in saved


@pytest.mark.parametrize("tracker", EVERY_TRACKER)
def test_trackers_receive_no_passwords(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_of(tracker, monkeypatch)
    keep_on_this_machine(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--data", URL, f"--data={SIGNED}"])
    trackers = Trackers(recipe(tracker), data_set=URL)
    trackers.open(tmp_path, step=0)
    trackers.log_line("train", {"step": 1, "loss": 1.0})
    trackers.finish()
    assert trackers.messages() == []
    if tracker == "wandb":
        sys.modules["wandb"].teardown()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"https:/***@host/set" in written  # an option
    assert found_in(tmp_path) == []


def test_the_status_file_contains_no_passwords(tmp_path: Path) -> None:
    write_status(tmp_path, "failed", reason=f"{URL}: not there")
    assert json.loads((tmp_path / STATUS_NAME).read_text())["reason"] == "https://***@host/set: not there"


def test_nested_values_are_redacted() -> None:
    assert redacted({URL: [Path("a"), (SIGNED, 3)], "x": None}) == {
        "https://***@host/set": ["a", ["https://host/set?***", 3]],
        "x": None,
    }


def test_provenance_records_neither_environment_nor_remotes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "GIT_REMOTE"):
        monkeypatch.setenv(name, CANARY)
    assert CANARY not in json.dumps([versions(), git_state()])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (Path(URL), "https:/***@host/set"),  # Path turns // into /
        ("a\nb\x1b[31m\r\udcff\u202e", r"a\nb\x1b[31m\r\udcff\u202e"),
        ("ünï [b] $x$", "ünï [b] $x$"),
    ],
)
def test_printed_text_is_one_line_without_passwords(text: Any, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UserError(f"{URL}: a\nb")) == 2
    assert capsys.readouterr().err == "error: https://***@host/set: a\\nb\n"


@pytest.mark.usefixtures("restore_hooks")
def test_logs_of_all_libraries_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    protect_output()
    protect_output()
    log = logging.getLogger("some.library")
    with caplog.at_level(logging.INFO):
        log.info("GET %s: %d %%", URL, 503)
        log.info("plain %s")
        try:
            raise OSError(f"no answer from {URL}")
        except OSError:
            log.exception("failed")
    assert [record.getMessage() for record in caplog.records if record.args is None] == [
        "GET https://***@host/set: 503 %",
        "plain %s",
        "failed",
    ]
    assert CANARY not in caplog.text
    assert "OSError: no answer from https://***@host/set" in caplog.text


@pytest.mark.usefixtures("restore_hooks")
def test_warnings_are_redacted() -> None:
    protect_output()
    assert CANARY not in warnings.formatwarning(UserWarning(URL), UserWarning, "x.py", 1, line="")


def test_tracebacks_are_redacted() -> None:
    try:
        raise RuntimeError(f"lost {URL}") from OSError(SIGNED)
    except RuntimeError as error:
        text = redacted_traceback(error)
    assert "RuntimeError: lost https://***@host/set" in text
    assert CANARY not in text.replace(__file__, "")


def test_uncaught_errors_of_all_threads_are_redacted() -> None:
    program = f"""
import threading
from shards.redact import protect_output
protect_output()
url = "https://me:" + {CANARY!r} + "@host"
def fail(): raise OSError(url)
thread = threading.Thread(target=fail); thread.start(); thread.join()
fail()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("OSError: https://***@host") == 2
    assert CANARY not in done.stderr


def test_file_names_that_are_not_utf_8_can_be_printed() -> None:
    program = "from shards.redact import protect_output; protect_output(); print('a\\udcff')"
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=env)
    assert done.stdout == b"a\\udcff\n"


def test_passwords_after_a_single_slash_are_redacted() -> None:
    assert redact(f"runs/https:/me:{CANARY}@host/x?a") == "runs/https:/***@host/x?***"
    assert redaction.HIDDEN == "***"


def test_a_saved_recipe_can_be_read_again(tmp_path: Path) -> None:
    description = {
        "recipe": recipe().to_dict(),
        "engine": {"zero": 0, "precision": "fp32", "world": 1, "device": "cpu", "cores": 2},
        "kernels": {},
        "versions": versions(),
        "git": git_state(),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(description))
    saved = read_saved_run(tmp_path).recipe
    assert saved.data.size == 224
    assert saved.log.tracker == ("tensorboard",)
