"""What the first and the second signal do in each phase of a training (launch/resilience/stop_signals.py)."""

from __future__ import annotations

import os
import signal
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, Signals

import pytest

from launch.machine.simple_launcher import LAUNCHER, is_simple_launch
from launch.resilience import stop_signals
from launch.resilience.stop_signals import Phase, StopSignals, Unsaved
from tests.support.waiting import wait_until


class Ended(BaseException):
    """Stands for the end of the process."""


class Recorded(StopSignals):
    """Signals of a run at step 12 whose newest checkpoint is of step 10."""

    def __init__(self, patch: pytest.MonkeyPatch, phase: Phase) -> None:
        super().__init__()
        self.phase = phase
        self.printed: list[str] = []
        self.statuses: list[tuple[str, int | None, str]] = []
        self.ended: list[int] = []
        self.seconds = 100.0
        self.say = self.printed.append
        self.unsaved = lambda: Unsaved(12, 10)
        self.write_status = lambda *status: self.statuses.append(status)
        patch.setattr(stop_signals, "write_line", self.printed.append)
        patch.setattr(LAUNCHER, "exit", self.ended.append)
        patch.setattr(stop_signals.time, "monotonic", lambda: self.seconds)

    def after(self, seconds: float, number: Signals) -> list[int]:
        """Receive a signal; return the statuses with which the process would have ended."""
        self.seconds += seconds
        self._react(number)
        return self.ended


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        (Phase.TRAINING, "finishing this step, then saving; press Ctrl-C again to stop without saving"),
        (Phase.EVALUATING, "interrupting the evaluation, which the next start repeats; then saving; press Ctrl-C "),
        (Phase.SAVING, "saving the checkpoint, then stopping; press Ctrl-C again to stop without saving"),
        (Phase.FINISHING, "training is complete; writing the last files; press Ctrl-C again to end without them"),
    ],
)
def test_the_first_signal_says_what_will_happen(monkeypatch: pytest.MonkeyPatch, phase: Phase, line: str) -> None:
    signals = Recorded(monkeypatch, phase)
    assert signals.after(0, SIGINT) == []
    assert len(signals.printed) == 1
    assert signals.printed[0].startswith(f"SIGINT: {line}")
    assert signals.statuses == []


@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGUSR2, SIGHUP])
def test_a_run_that_starts_ends_at_once_and_can_be_started_again(
    monkeypatch: pytest.MonkeyPatch, number: Signals
) -> None:
    signals = Recorded(monkeypatch, Phase.STARTING)
    assert signals.after(0, number) == [128 + number]
    assert signals.printed == ["interrupted before training started; nothing is lost"]
    assert signals.statuses == [("preempted", None, f"{number.name} before training started")]


@pytest.mark.parametrize(
    ("first", "second", "seconds", "ends"),
    [
        (SIGINT, SIGINT, 0.2, False),  # a double press, or one that a launcher has forwarded
        (SIGINT, SIGINT, 1.5, True),  # a person who has read the line
        (SIGINT, SIGTERM, 1.5, False),  # a launcher that ends its processes
        (SIGTERM, SIGTERM, 1.5, False),  # SLURM and its launcher
        (SIGHUP, SIGTERM, 1.5, False),  # a terminal that is closed
        (SIGTERM, SIGTERM, 6.0, True),
        (SIGTERM, SIGINT, 6.0, True),
    ],
)
def test_a_second_signal_says_what_is_lost_unless_it_is_the_same_request(
    monkeypatch: pytest.MonkeyPatch, first: Signals, second: Signals, seconds: float, ends: bool
) -> None:
    signals = Recorded(monkeypatch, Phase.TRAINING)
    signals.after(0, first)
    lost = "ended at once; lost: 2 steps since the checkpoint of step 10"
    assert signals.after(seconds, second) == ([128 + second] if ends else [])
    assert signals.printed[1:] == ([lost] if ends else [])
    assert signals.statuses == ([("failed", 10, f"{second.name} twice: {lost}")] if ends else [])


def test_a_launcher_does_not_end_a_rank_that_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Recorded(monkeypatch, Phase.TRAINING)
    signals.after(0, SIGTERM)
    signals.phase = Phase.ENDING
    assert signals.after(20, SIGTERM) == []
    assert signals.after(20, SIGINT) == [130]


def test_other_ranks_print_and_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    signals = Recorded(monkeypatch, Phase.TRAINING)
    signals.after(0, SIGINT)
    assert signals.after(2, SIGINT) == [130]
    assert signals.printed == signals.statuses == []


@pytest.mark.parametrize(
    ("step", "saved", "text"),
    [
        (7, 7, "nothing is lost, the checkpoint of step 7 contains all steps"),
        (8, 7, "lost: 1 step since the checkpoint of step 7"),
        (1200, None, "lost: 1,200 steps, all of the run"),
    ],
)
def test_lost_steps_are_counted(step: int, saved: int | None, text: str) -> None:
    assert str(Unsaved(step, saved)) == text


def test_real_signals_set_flags_and_the_old_handlers_return(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (SIGTERM, SIGUSR1)]
    signals = StopSignals()
    printed: list[str] = []
    signals.say = printed.append
    with signals:
        signals.phase = Phase.TRAINING
        os.kill(os.getpid(), SIGUSR1)
        assert (signals.save, signals.stop) == (True, "")
        os.kill(os.getpid(), SIGTERM)
        assert signals.stop == "SIGTERM"
        wait_until(lambda: printed)
    assert printed == ["SIGTERM: finishing this step, then saving; send it again after 5 s to stop without saving"]
    assert [signal.getsignal(number) for number in (SIGTERM, SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("command", "variables", "expected"),
    [
        ("python bin/accelerate launch launch/train.py", {}, True),
        ("python bin/accelerate-launch launch/train.py", {}, True),
        ("python -m accelerate.commands.launch launch/train.py", {}, True),
        ("python -m accelerate.commands.accelerate_cli launch launch/train.py", {}, True),
        ("python -m accelerate.commands.launch launch/train.py", {"TORCHELASTIC_RUN_ID": "none"}, False),
        ("python -m accelerate.commands.launch launch/train.py", {"WORLD_SIZE": "2"}, False),
        ("python bin/accelerate config", {}, False),
        ("python bin/torchrun launch/train.py --data accelerate launch", {}, False),
        ("bash", {}, False),
        ("bash -c accelerate", {}, False),
        ("", {}, False),
    ],
)
def test_only_the_launcher_of_a_single_process_is_recognized(
    command: str, variables: dict[str, str], expected: bool
) -> None:
    assert is_simple_launch(command.split(" "), variables) is expected
