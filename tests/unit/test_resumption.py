"""Return a run to a checkpoint, or branch from another run (launch/resume), without training: files and errors."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fat
from launch.resume import fingerprint
from launch.resume.decision import decide_resume
from launch.resume.fingerprint import FREE_BETWEEN_EPOCHS, FREE_IN_BRANCH, check_branch, check_fingerprint
from launch.resume.folder import RunFolder
from launch.resume.length import describe_schedule
from launch.resume.preview import preview_resume
from launch.run.checkpoint import CheckpointError, read_checkpoint
from launch.run.origin import read_origins
from launch.run.progress import Progress
from launch.run.status import RunFailed
from tests.support.run_folder_starts import run_folder, save, save_evaluated

ACCURACIES = {7: 0.5, 14: 0.4, 22: 0.7, 30: 0.6, 44: 0.8}
"""Top-1 accuracies by step."""


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with five checkpoints."""
    folder = run_folder(digits, tmp_path_factory.mktemp("source") / "run", "--keep", "9")
    folder.resume()
    save_evaluated(folder, ACCURACIES)
    return folder.path


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def weights_step(run: Path, which: str) -> int | None:
    return fat.read_info(run / f"weights-{which}.safetensors").step


@pytest.mark.parametrize(("step", "best"), [(7, 7), (14, 7), (22, 22), (30, 22), (44, 44)])
def test_weights_after_the_return_are_those_of_the_step_and_the_best_one_before(
    digits: Path, copy: Path, step: int, best: int
) -> None:
    folder = run_folder(digits, copy, "--resume", f"step:{step}")
    progress, _ = folder.resume()
    assert (progress.step, progress.best) == (step, ACCURACIES[best])
    assert (weights_step(copy, "last"), weights_step(copy, "best")) == (step, best)
    later = [each for each in ACCURACIES if each > step]
    assert steps(copy / "checkpoints-before-1") == later
    assert (copy / "checkpoints-before-1").exists() == bool(later)


def test_a_best_checkpoint_that_has_been_removed_is_reported(digits: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-00000022")
    _, messages = run_folder(digits, copy, "--resume", "step:30").resume()
    fact = "the best top-1 accuracy up to step 30 is 70.00%, but the checkpoint that had it has been removed"
    assert f"warning: {fact}; weights-best.safetensors has the 60.00% of step 30" in messages
    assert weights_step(copy, "best") == 30


def test_a_damaged_best_checkpoint_is_skipped(digits: Path, copy: Path) -> None:
    (copy / "checkpoints" / "step-00000022" / "state.safetensors").write_bytes(b"damaged")
    _, messages = run_folder(digits, copy, "--resume", "step:30").resume()
    assert any("step-00000022: damaged" in message for message in messages)
    assert weights_step(copy, "best") == 30


def test_best_files_that_are_older_than_the_step_stay(digits: Path, copy: Path) -> None:
    save_evaluated(resumed(digits, copy), {50: 0.1, 55: 0.2})
    before = (copy / "weights-best.safetensors").stat().st_mtime_ns
    run_folder(digits, copy, "--resume", "step:50").resume()
    assert (weights_step(copy, "best"), weights_step(copy, "last")) == (44, 50)
    assert (copy / "weights-best.safetensors").stat().st_mtime_ns == before


def resumed(digits: Path, run: Path, *options: str) -> RunFolder:
    folder = run_folder(digits, run, *options)
    folder.resume()
    return folder


def test_nothing_is_moved_if_the_checkpoint_does_not_fit_the_run(digits: Path, copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    for options in (("--seed", "1"), ("--epochs", "1"), ("--stop-after", "20")):
        with pytest.raises(CheckpointError):
            run_folder(digits, copy, "--resume", "step:30", *options).resume()
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "1", "--resume", "step:30"), "with --epochs 1, the run ends after step 22, .* least --epochs 2,"),
        (("--epochs", "1", "--resume", "step:44"), "use at least --epochs 2, or choose an earlier checkpoint"),
        (("--stop-after", "20", "--resume", "step:30"), "with --stop-after 20, .* at least --stop-after 30, or"),
        (("--epochs", "1"), "--epochs 1: the run has done 44 steps, .* the 22 of 1 epoch; use at least --epochs 2, or"),
    ],
)
def test_run_that_ends_before_the_checkpoint(
    digits: Path, copy: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        run_folder(digits, copy, *options).resume()


def test_branch_needs_steps_to_train(digits: Path, copy: Path, tmp_path: Path) -> None:
    for options in (("--epochs", "2"), ("--stop-after", "44")):
        with pytest.raises(CheckpointError, match="the run ends after step 44, but the checkpoint is that of step 44"):
            run_folder(digits, tmp_path / "new", "--resume", str(copy), *options).resume()
    assert not list((tmp_path / "new").glob("checkpoints/step-*"))
    assert resumed(digits, tmp_path / "new", "--resume", str(copy), "--stop-after", "45").newest_step == 44


def test_a_branch_has_its_own_checkpoint_and_its_best_is_that_of_this_step(
    digits: Path, copy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new"
    progress, _ = run_folder(digits, out, "--resume", str(copy / "checkpoints" / "step-00000030")).resume()
    assert (progress.step, progress.best, progress.best_of, progress.is_best) == (30, 0.6, "weights", True)
    assert (weights_step(out, "last"), weights_step(out, "best")) == (30, 30)
    shutil.rmtree(copy)
    again, _ = run_folder(digits, out, "--resume", str(copy / "checkpoints" / "step-00000030")).resume()
    assert again == progress, "the branch does not need the other run any more"


def test_files_of_a_start_without_checkpoints_are_moved_before_a_branch(
    digits: Path, copy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new"
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    _, messages = run_folder(digits, out, "--resume", str(copy)).resume()
    assert f"warning: {out} had files of an earlier run, which are now in {out / 'checkpoints-before-1'}" in messages
    assert (out / "checkpoints-before-1" / "metrics.jsonl").exists()


def test_a_branch_whose_checkpoints_are_all_damaged_branches_again(digits: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    folder = resumed(digits, out, "--resume", str(copy))
    save(folder, 50)
    assert folder._writer.wait()
    for path in (out / "checkpoints").iterdir():
        (path / "meta.json").unlink(missing_ok=True)
    copy.rename(tmp_path / "away")
    for _ in range(2):  # nothing is moved while the other run is missing
        with pytest.raises(CheckpointError, match="44: damaged"):
            run_folder(digits, out).resume()
    (tmp_path / "away").rename(copy)
    *_, preview = preview_resume(decide_resume(out, "auto"), run_folder(digits, out)._feed, None)
    assert preview.startswith(f"branching from step 44 of {copy}")
    run_folder(digits, out)._resumption.choose()  # a start that is killed before it has loaded the checkpoint
    progress, messages = run_folder(digits, out).resume()
    assert progress.step == 44
    assert any("all checkpoints are damaged, so the run branches again from" in message for message in messages)
    assert steps(out / "checkpoints-before-1") == [44, 50]
    assert steps(out / "checkpoints") == [44]


def test_a_run_that_starts_anew_forgets_the_choice(digits: Path, copy: Path) -> None:
    run_folder(digits, copy, "--resume", "step:30").resume()
    run_folder(digits, copy, "--resume", "never").resume()
    assert read_origins(copy).rewind is None
    assert (copy / "checkpoints-before-2" / "origin.json").exists()


# Values of each option in the fingerprint that differ from those of `current`.
OTHER: dict[str, Any] = {"val_index": "f" * 16}


@pytest.mark.parametrize("position", [0, 5])
def test_every_fixed_option_is_rejected_or_permitted(digits: Path, copy: Path, position: int) -> None:
    """On resume, none of them may differ. In a branch, those may that neither the state nor the position depend on."""
    current = run_folder(digits, copy)._fingerprint
    found = read_checkpoint(copy / "checkpoints" / "step-00000022", 22)
    found = replace(found, progress=replace(found.progress, epoch_step=position))
    permitted = {*FREE_IN_BRANCH} | ({*FREE_BETWEEN_EPOCHS} if position == 0 else set())
    assert permitted < current.fixed.keys()
    for name in current.fixed:
        changed = replace(current, fixed=current.fixed | {name: OTHER.get(name, 77)})
        with pytest.raises(CheckpointError, match=f"{name} was .*, now "):
            check_fingerprint(found, changed)
        if name in permitted:
            assert [fact.partition(" was ")[0] for fact in check_branch(found, changed)] == [name]
        else:
            with pytest.raises(CheckpointError, match=f"a branch cannot change .*{name} was .*, now "):
                check_branch(found, changed)
    for name in current.free:
        changed = replace(current, free=current.free | {name: 77})
        for check in (check_fingerprint, check_branch):
            assert [fact.partition(" was ")[0] for fact in check(found, changed)] == [name]


@pytest.mark.parametrize(
    "options",
    [
        ("--augment", "light"),
        ("--size", "48"),
        ("--lr", "0.1", "--schedule", "linear", "--weight-decay", "0", "--clip-grad", "1", "--label-smoothing", "0"),
        ("--epochs", "9"),
        ("--loss", "bce"),
        ("--drop-path", "0.2"),
        ("--seed", "3", "--lanes", "8", "--shuffle-block-size", "64"),  # the checkpoint is at the end of an epoch
    ],
)
def test_options_that_a_branch_may_change(
    digits: Path, copy: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    progress, messages = run_folder(digits, tmp_path / "new", "--resume", str(copy), *options).resume()
    assert progress.step == 44
    assert sum("the run continues with the new value" in message for message in messages) >= len(options) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--global-batch", "32"), "a branch cannot change these options .global_batch was 64, now 32"),
        (("--variant", "b1"), "a branch cannot change these options .model was fat_b0, now fat_b1"),
        (("--optimizer", "sgd"), "optimizer was adamw, now sgd.*; use the same options, or start .* with --weights"),
        (("--class-balance", "0.5"), "class_balance was 0.0, now 0.5"),
        (("--fraction", "0.5"), "fraction was"),
        (("--classes-subset", "5"), "saved by a run with other classes"),
    ],
)
def test_options_that_a_branch_may_not_change(
    digits: Path, copy: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        run_folder(digits, tmp_path / "new", "--resume", str(copy), *options).resume()
    assert not (tmp_path / "new" / "origin.json").exists()


def test_the_order_of_samples_cannot_change_within_an_epoch(digits: Path, copy: Path, tmp_path: Path) -> None:
    path = str(copy / "checkpoints" / "step-00000030")
    with pytest.raises(CheckpointError, match=r"within an epoch \(8 steps after its beginning\), .* \(seed was 0, now"):
        run_folder(digits, tmp_path / "new", "--resume", path, "--seed", "3").resume()


def test_accuracies_on_other_images_do_not_count_in_a_branch(digits: Path, copy: Path) -> None:
    current = run_folder(digits, copy)._fingerprint
    found = read_checkpoint(copy / "checkpoints" / "step-00000044", 44)
    assert fingerprint.first_progress(found, current).best == 0.8
    for changed in (
        replace(current, fixed=current.fixed | {"val_index": "f" * 16}),
        replace(current, free=current.free | {"crop_pct": 0.5}),
    ):
        first = fingerprint.first_progress(found, changed)
        assert (first.best, first.best_of, first.top1, first.is_best, first.step) == (0.0, None, {}, False, 44)


RATE = ("--lr", "0.1", "--warmup-epochs", "0")


@pytest.mark.parametrize(
    ("schedule", "epochs", "jumps"),
    [
        ("constant", (2, 4), False),
        ("wsd", (3, 6), False),  # the rate has not begun to fall
        ("wsd", (2, 4), True),
        ("linear", (2, 4), True),
        ("cosine", (3, 3), None),
    ],
)
def test_the_rates_before_and_after_a_change_of_the_schedule(
    digits: Path, source: Path, schedule: str, epochs: tuple[int, int], jumps: bool | None
) -> None:
    before, now = epochs

    def folder(length: int) -> RunFolder:
        return run_folder(digits, source, *RATE, "--schedule", schedule, "--epochs", str(length))

    earlier, later = folder(before), folder(now)
    found = read_checkpoint(source / "checkpoints" / "step-00000044", 44)
    found = replace(found, fingerprint=earlier._fingerprint)
    messages = describe_schedule(found, later._feed, later._fingerprint)
    assert len(messages) == (jumps is not None)
    for message in messages:
        last, following = (float(word) for word in re.findall(r"\d\.\d{3}e-\d\d", message))
        assert (following > 2 * last) == jumps
        assert (following == last == 0.1) == (not jumps)
        assert f"{schedule} over {now} epochs, before {schedule} over {before} epochs" in message


class Killed:
    """Kills this process at its n-th change of a file system."""

    NAMES = ("rename", "replace", "mkdir", "unlink", "chmod")

    def __init__(self, number: int, *, after: bool) -> None:
        self._left, self._after = number, after

    def install(self) -> None:
        for name in self.NAMES:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return change


def killed_starts(start: Callable[[], RunFolder], reset: Callable[[], object]) -> Iterator[bool]:
    """Let a start be killed at each of its changes of files, and yield after each kill.

    The yielded value alternates, for one of two ways to start again.
    """
    for number in range(1, 200):
        reset()
        folder = start()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                Killed(number, after=bool(number % 2)).install()
                folder.resume()
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            assert number > 10, "the start changes many files"
            return
        yield number % 4 < 2
    pytest.fail("the start never ends")


def test_a_return_that_is_killed_is_completed_by_the_next_start(digits: Path, source: Path, tmp_path: Path) -> None:
    """By the same command, and by one without `--resume`, such as that of a requeued job with `--resume never`."""
    run, completed = tmp_path / "run", 0

    def reset() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        (run / "evaluation.safetensors").touch()

    for same in killed_starts(lambda: run_folder(digits, run, "--resume", "step:14"), reset):
        if not same and read_origins(run).rewind is None:
            assert steps(run / "checkpoints") == list(ACCURACIES), "nothing has been moved yet"
            continue
        pending = read_origins(run).pending is not None
        progress, messages = run_folder(digits, run, "--resume", "step:14" if same else "auto").resume()
        completed += pending
        assert pending == ("an earlier start was interrupted while returning to step 14; completing this" in messages)
        assert progress.step == 14
        assert steps(run / "checkpoints") == [7, 14]
        assert steps(run / "checkpoints-before-1") == [22, 30, 44]
        assert (run / "checkpoints-before-1" / "evaluation.safetensors").exists()
        assert not (run / "checkpoints-before-2").exists()
        assert (weights_step(run, "last"), weights_step(run, "best")) == (14, 7)
        assert read_origins(run).pending is None
    assert completed > 3


def test_a_branch_that_is_killed_is_completed_by_the_next_start(digits: Path, source: Path, tmp_path: Path) -> None:
    run, completed = tmp_path / "run", 0
    for same in killed_starts(
        lambda: run_folder(digits, run, "--resume", str(source)), lambda: shutil.rmtree(run, ignore_errors=True)
    ):
        if not same and read_origins(run).branch is None:
            continue
        completed += read_origins(run).pending is not None
        progress, _ = run_folder(digits, run, "--resume", str(source) if same else "auto").resume()
        assert progress.step == 44
        assert steps(run / "checkpoints") == [44]
        assert (weights_step(run, "last"), weights_step(run, "best")) == (44, 44)
        assert read_origins(run).pending is None
    assert completed > 1


def test_a_disk_that_is_full_leaves_the_return_to_the_next_start(
    digits: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("launch.run.weights_files.write_weights", full)
        with pytest.raises(RunFailed, match=r"could not be written.*No space left.*start the run again"):
            run_folder(digits, copy, "--resume", "step:14").resume()
    progress, messages = run_folder(digits, copy).resume()
    assert progress == Progress(step=14, epoch_step=14, best=0.5, best_of="weights", top1={"weights": 0.4})
    assert "an earlier start was interrupted while returning to step 14; completing this" in messages
    assert weights_step(copy, "best") == 7
