"""Which checkpoint a start resumes from (launch/resume/decision.py), and the errors of `--resume`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.config.resume import ResumeOption
from launch.resume.decision import ResumeDecision, decide_resume
from launch.run.checkpoint import CheckpointError, Fingerprint
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.origin import Origin, Origins, read_origins, write_origins
from launch.run.progress import Progress
from shards.errors import UserError

STEPS = (10, 20, 30)
BEST = 20
REWOUND = Origin(request="step:10", checkpoint="checkpoints/step-00000010", step=10, digest="0" * 16, complete=True)


def save(run: Path, *steps: int, best: int = 0) -> None:
    folder = CheckpointFolder(run / "checkpoints", keep=100)
    for step in steps:
        progress = Progress(step=step, epoch_step=step, is_best=step == best, best=0.5 * (step >= best > 0))
        folder.save({"w": torch.zeros(1)}, progress, Fingerprint({}, {}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with three checkpoints."""
    save(tmp_path / "run", *STEPS, best=BEST)
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The folder of another run."""
    save(tmp_path / "other", 5, 7)
    return tmp_path / "other"


def decided(decision: ResumeDecision) -> tuple[str, str, str | None]:
    """Return kind, name of the run folder and name of the checkpoint."""
    return decision.kind, decision.run.name, decision.checkpoint and decision.checkpoint.name


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("auto", ("newest", "run", None)),
        ("never", ("never", "run", None)),
        ("step:10", ("rewind", "run", "step-00000010")),
        ("step:00030", ("rewind", "run", "step-00000030")),
        ("best", ("rewind", "run", "step-00000020")),
        ("{run}/checkpoints/step-00000020", ("rewind", "run", "step-00000020")),
        ("{link}/checkpoints/step-00000020/", ("rewind", "run", "step-00000020")),
        ("{run}", ("newest", "run", None)),
        ("{run}/checkpoints", ("newest", "run", None)),
    ],
)
def test_checkpoint_of_the_run_folder(run: Path, resume: str, expected: tuple[str, str, str | None]) -> None:
    link = run.with_name("link")
    link.symlink_to(run)
    assert decided(decide_resume(run, resume.format(run=run, link=link))) == expected


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("{other}/checkpoints/step-00000005", ("branch", "other", "step-00000005")),
        ("{other}", ("branch", "other", None)),
        ("{other}/checkpoints", ("branch", "other", None)),
    ],
)
def test_checkpoint_of_another_run(other: Path, resume: str, expected: tuple[str, str, str | None]) -> None:
    decision = decide_resume(other.with_name("new"), resume.format(other=other))
    assert decided(decision) == expected
    found, warnings = decision.open()
    assert (found.progress.step, warnings) == (5 if expected[2] else 7, [])


def test_new_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    decision = decide_resume(tmp_path / "new", "auto")
    assert (decision.kind, decision.resumes) == ("new", False)


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("step:25", r"has no checkpoint of step 25; it has those of the steps 10, 20 and 30 \(--save-every and"),
        ("latest", r"--resume latest: no such folder; did you mean auto\? \(expected auto, never, best, step:N,"),
        ("resume", r"--resume resume: no such folder \(expected"),
        ("bets", "--resume bets: no such folder; did you mean best?"),
        ("Best", "--resume Best: no such folder; did you mean best?"),
        ("20", "--resume 20: no such folder; did you mean step:20?"),
        ("step-00000020", "no such folder; did you mean step:20?"),
        ("step=20", "no such folder; did you mean step:20?"),
        ("{run}/checkpoints/step-00000025", "has no checkpoint of step 25; it has those of the steps 10, 20 and 30"),
        ("{run}/none", "none: no such folder"),
        ("a" * 300, r"--resume a+: cannot be opened \(File name too long\); expected auto, never, best"),
        ("{empty}", "empty: contains no checkpoints; expected a checkpoint folder, such as RUN/checkpoints/step-0000"),
        ("{file}", "weights-last.safetensors: is a file; expected .*; to start from a weights file, use --weights"),
        ("{other}", "run has checkpoints of another history, which began from the beginning; use a new run folder"),
    ],
)
def test_errors(run: Path, other: Path, tmp_path: Path, resume: str, message: str) -> None:
    empty, file = tmp_path / "empty", tmp_path / "weights-last.safetensors"
    empty.mkdir()
    file.touch()
    with pytest.raises(UserError, match=message) as error:
        decide_resume(run, resume.format(run=run, other=other, empty=empty, file=file))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("step:x", "--resume step:x: expected the number of an optimizer step, as in step:5000"),
        ("step:", "--resume step:: expected the number of an optimizer step"),
        ("step:-1", "step:-1: expected the number"),
        ("step:1e3", "step:1e3: expected the number"),
        ("step:" + "9" * 30, "expected the number"),
        ("step:" + "0" * 30 + "9" * 5000, "expected the number"),
        ("step:runs/a", "a path that begins with step: needs ./ in front"),
        ("", "expected auto, never, best, step:N, or the path of a checkpoint or run folder"),
    ],
)
def test_invalid_values_are_rejected_by_the_command_line(resume: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(["--data", "set", "--resume", resume])


def test_a_path_is_taken_as_it_is() -> None:
    assert ResumeOption.parse("./step:5") == ResumeOption("path", path=Path("step:5"))


@pytest.mark.parametrize("resume", ["step:10", "best"])
def test_a_folder_without_checkpoints_has_none_to_choose(tmp_path: Path, resume: str) -> None:
    with pytest.raises(CheckpointError, match=f"--resume {resume}: .*new has no checkpoints; omit the option"):
        decide_resume(tmp_path / "new", resume)


def test_no_checkpoint_is_the_best_before_an_evaluation(other: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is marked as the best, .* of the steps 5 and 7"):
        decide_resume(other, "best")


def test_the_newest_of_many_steps_are_listed(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 21))
    with pytest.raises(CheckpointError, match=r"the steps \(8 earlier ones\), 9, 10, .* 19 and 20 \("):
        decide_resume(tmp_path, "step:99")


@pytest.mark.parametrize("resume", ["step:20", "{other}/checkpoints/step-00000007"])
def test_a_damaged_checkpoint_that_is_chosen_is_an_error(run: Path, other: Path, resume: str) -> None:
    for path in (run / "checkpoints" / "step-00000020", other / "checkpoints" / "step-00000007"):
        (path / "state.safetensors").write_bytes(b"damaged")
    text = resume.format(other=other)
    decision = decide_resume(run.with_name("new") if "other" in resume else run, text)
    with pytest.raises(CheckpointError, match=r"damaged \(state.safetensors does not match its hash\); choose"):
        decision.open()


def test_damaged_checkpoints_of_another_run_folder_are_skipped_with_a_warning(other: Path) -> None:
    (other / "checkpoints" / "step-00000007" / "meta.json").unlink()
    found, warnings = decide_resume(other.with_name("new"), str(other)).open()
    assert found.progress.step == 5
    assert len(warnings) == 1
    assert "step-00000007: damaged" in warnings[0]
    (other / "checkpoints" / "step-00000005" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="all checkpoints of this run are damaged"):
        decide_resume(other.with_name("new"), str(other)).open()


def test_a_damaged_checkpoint_that_may_be_the_best_is_named(run: Path) -> None:
    (run / "checkpoints" / "step-00000030" / "meta.json").unlink()
    decision = decide_resume(run, "best")
    assert decided(decision) == ("rewind", "run", "step-00000020")
    assert "step-00000030: damaged" in decision.messages[0]


class TestSameCommandAgain:
    """origin.json has what an earlier start did."""

    @pytest.mark.parametrize(
        ("resume", "kind"), [("step:10", "newest"), ("auto", "newest"), ("step:20", "rewind"), ("best", "rewind")]
    )
    def test_rewind(self, run: Path, resume: str, kind: str) -> None:
        write_origins(run, Origins(rewind=REWOUND))
        decision = decide_resume(run, resume)
        assert decision.kind == kind
        if resume == "step:10":
            (message,) = decision.messages
            assert "has returned to step 10 already, so it resumes from its newest checkpoint; to return" in message

    @pytest.mark.parametrize("path", ["{other}", "{other}/../other/"])
    def test_branch(self, run: Path, other: Path, path: str) -> None:
        branch = replace(REWOUND, request=str(other), checkpoint=str(other / "checkpoints" / "step-00000005"), step=5)
        write_origins(run, Origins(branch=branch))
        save(other, 9)  # the other run has continued
        decision = decide_resume(run, path.format(other=other))
        assert decided(decision) == ("newest", "run", None)
        with pytest.raises(CheckpointError, match=r"another history, which began with step 5 of .*step-00000005; use"):
            decide_resume(run, str(other / "checkpoints" / "step-00000007"))

    def test_a_branch_without_checkpoints_branches_again(self, other: Path, tmp_path: Path) -> None:
        checkpoint = decide_resume(tmp_path / "new", str(other)).open()[0]
        branch = replace(REWOUND, request=str(other), checkpoint=str(checkpoint.path), digest=checkpoint.state.xxh3)
        (tmp_path / "new").mkdir()
        write_origins(tmp_path / "new", Origins(branch=branch))
        save(other, 9)
        for resume in ("auto", str(other)):
            kind, _, _ = decided(decide_resume(tmp_path / "new", resume))
            assert kind == "branch"
        decision = decide_resume(tmp_path / "new", "auto")
        assert decision.open()[0].progress.step == 7, "the checkpoint with which the run began"
        write_origins(tmp_path / "new", Origins(branch=replace(branch, digest="f" * 16)))
        with pytest.raises(CheckpointError, match="differs from the checkpoint that an earlier start"):
            decide_resume(tmp_path / "new", "auto").open()


@pytest.mark.parametrize("resume", ["auto", "step:10"])
def test_an_interrupted_return_is_completed(run: Path, resume: str) -> None:
    write_origins(run, Origins(rewind=replace(REWOUND, complete=False)))
    decision = decide_resume(run, resume)
    assert decided(decision) == ("rewind", "run", "step-00000010")
    assert decision.messages == ("an earlier start was interrupted while returning to step 10; completing this",)


@pytest.mark.parametrize("resume", ["step:20", "best", "{other}"])
def test_an_interrupted_return_comes_before_another_choice(run: Path, other: Path, resume: str) -> None:
    write_origins(run, Origins(rewind=replace(REWOUND, complete=False)))
    with pytest.raises(CheckpointError, match="interrupted while returning to step 10; start once with --resume auto"):
        decide_resume(run, resume.format(other=other))
    assert decide_resume(run, "never").kind == "never"


@pytest.mark.parametrize("content", ["", "{", '{"branch": 5}', '{"rewind": {"request": "x"}}'])
def test_a_damaged_record_is_an_error(run: Path, content: str) -> None:
    (run / "origin.json").write_text(content)
    with pytest.raises(UserError, match=r"origin.json: damaged \(.*\); restore it; or remove it, and check"):
        decide_resume(run, "auto")


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    origins = Origins(branch=REWOUND, rewind=replace(REWOUND, archive="checkpoints-before-3", complete=False))
    write_origins(tmp_path, origins)
    assert read_origins(tmp_path) == origins
    assert origins.pending == origins.rewind
    assert origins.completed().pending is None
