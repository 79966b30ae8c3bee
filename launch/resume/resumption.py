"""Choose the checkpoint that a start resumes from, return the run to it or copy it from another run.

`choose` only reads, except that it moves files of a run that starts anew. `carry_out` moves and copies files, after the
checkpoint was loaded. It first writes RUN/origin.json, from which a later start completes it if this one is killed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from launch.feed import Feed
from launch.resume.check import check_resume
from launch.resume.decision import ResumeDecision, branch_again, decide_resume
from launch.resume.fingerprint import first_progress
from launch.resume.local_checkpoints import LocalCheckpoints
from launch.resume.set_aside import is_later, restore_best_weights, set_all_aside, set_later_aside
from launch.run.checkpoint import Checkpoint, CheckpointError, Fingerprint
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.files import unwritable
from launch.run.metrics_file import METRICS_NAME
from launch.run.origin import ORIGIN_NAME, Origin, Origins, read_origins, write_origins
from launch.run.progress import Progress
from launch.run.status import RESUME_HINT, RunFailed
from launch.run.weights_files import WeightsFiles, all_weights_files
from shards.errors import UserError

Choice = tuple[ResumeDecision, Checkpoint | None, list[str]]


class Resumption:
    """Resumes a run in its folder `out`. Used on rank 0, which holds the lock of the folder.

    Args:
        fingerprint: fingerprint of this start.
        checkpoints: checkpoints of the run folder.
        weights: weights files of the run folder.
        local: local checkpoints; None: not used.
    """

    def __init__(
        self,
        out: Path,
        feed: Feed,
        fingerprint: Fingerprint,
        checkpoints: CheckpointFolder,
        weights: WeightsFiles,
        *,
        local: LocalCheckpoints | None = None,
    ) -> None:
        self._out, self._feed, self._fingerprint = out, feed, fingerprint
        self._checkpoints, self._weights, self._local = checkpoints, weights, local
        self.newest: Progress | None = None
        """Progress in the newest checkpoint of the run folder, if the start resumes from it or a local one."""

    def choose(self) -> Choice:
        """Return what the start begins with, its checkpoint (None: start anew), and messages.

        Raises:
            CheckpointError: the chosen checkpoint is damaged, or does not fit model, data or options.
            StorageFailed: a checkpoint that may be undamaged cannot be read.
            UserError: the chosen checkpoint does not exist, or the folder cannot be written.
        """
        decision = decide_resume(self._out, self._feed.recipe.checkpoint.resume)
        messages = list(decision.messages)
        if decision.kind == "never":
            if archive := self._set_all_aside():
                messages.append(f"the earlier run's checkpoints and metrics are now in {archive}")
            return decision, None, messages
        if decision.kind in ("rewind", "branch"):
            return self._checked(decision, *decision.open(), messages)
        newest, skipped = self._checkpoints.newest()
        messages += [f"warning: {message}" for message in skipped]
        self.newest = newest.progress if newest is not None else None
        found, warnings = self._newer_local(newest)
        if found is not None:
            return self._checked(decision, found, warnings, messages)
        messages += warnings
        return self._without_checkpoint(decision, messages, damaged=bool(skipped))

    def _newer_local(self, newest: Checkpoint | None) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest local checkpoint if it is newer than that of the run folder, else that; and warnings.

        Args:
            newest: newest undamaged checkpoint of the run folder; None: all are damaged, or there are none.
        """
        followed = None if self._local is None else self._checkpoints.newest_described()
        if self._local is None or followed is None:
            return newest, []
        try:
            self._local.attach_to(followed)
        except UserError as error:
            return newest, [f"warning: {error}"]
        found, skipped = self._local.newest()
        newer = found is not None and (newest is None or found.progress.step > newest.progress.step)
        return found if newer else newest, [f"warning: {message}" for message in skipped]

    def _checked(self, decision: ResumeDecision, found: Checkpoint, warnings: list[str], messages: list[str]) -> Choice:
        changes = check_resume(decision, found, self._feed, self._fingerprint)
        return decision, found, [*messages, *warnings, *changes]

    def _without_checkpoint(self, decision: ResumeDecision, messages: list[str], *, damaged: bool) -> Choice:
        """Start anew, or branch again if the run began as a branch."""
        branch = read_origins(self._out).branch
        if damaged and branch is not None:  # `carry_out` moves the damaged checkpoints, after the other one was loaded
            messages.append(f"warning: all checkpoints are damaged, so the run branches again from {branch.checkpoint}")
            again = branch_again(branch)
            return self._checked(again, *again.open(), messages)
        if damaged:  # new checkpoints of the same steps would replace the damaged ones
            messages.append(
                "warning: all checkpoints are damaged, so the run starts from the beginning; the damaged checkpoints "
                f"and the metrics are now in {self._set_all_aside()}"
            )
        elif all_weights_files(self._out):
            messages.append(
                f"warning: {self._out} has weights of an earlier run, but no checkpoints; its weights and metrics are "
                f"now in {self._set_all_aside()}"
            )
        try:
            (self._out / ORIGIN_NAME).unlink(missing_ok=True)  # it describes checkpoints that no longer exist
        except OSError as error:
            raise unwritable(self._out, error) from error
        return decision, None, messages

    def _set_all_aside(self) -> Path | None:
        return set_all_aside(self._out, self._checkpoints)

    def first_progress(self, decision: ResumeDecision, found: Checkpoint) -> Progress:
        """Return the progress with which the start begins."""
        return first_progress(found, self._fingerprint) if decision.kind == "branch" else found.progress

    def carry_out(self, decision: ResumeDecision, found: Checkpoint, state: dict[str, Tensor]) -> list[str]:
        """Return the run to the chosen checkpoint, or copy it from another run; return messages.

        If the start resumes from the newest checkpoint and it is local, only lines of metrics.jsonl may be written.

        Raises:
            UserError: the run folder cannot be written. The next start completes what this one has begun.
        """
        if decision.kind not in ("rewind", "branch"):
            if self._local is not None:
                self._local.complete_metrics(found)
            return []
        step, digest = found.progress.step, found.state.xxh3
        origin = Origin(request=decision.request, checkpoint=str(found.path.absolute()), step=step, digest=digest)
        try:
            if decision.kind == "branch":
                messages = self._copy(decision, found, state, origin)
            else:
                messages = self._rewind(decision, found, replace(origin, checkpoint=f"{CHECKPOINTS}/{found.path.name}"))
            write_origins(self._out, read_origins(self._out).completed())
        except OSError as error:
            raise unwritable(self._out, error) from error
        except CheckpointError as error:
            raise RunFailed(f"{error}; {RESUME_HINT}") from error
        if self._local is not None:
            try:
                self._local.attach_to(self._out / CHECKPOINTS / f"step-{step:08d}", new=True)
            except UserError as error:
                messages.append(f"warning: {error}")
        return messages

    def _copy(self, decision: ResumeDecision, found: Checkpoint, state: dict[str, Tensor], origin: Origin) -> list[str]:
        """Copy the checkpoint of another run to this run folder; return messages."""
        messages = []
        if decision.begun is None or decision.begun.complete:
            archive = set_all_aside(self._out, self._checkpoints, metrics=True)
            if archive is not None:
                messages.append(f"warning: {self._out} had files of an earlier run, which are now in {archive}")
        write_origins(self._out, Origins(branch=origin))
        self._checkpoints.save(state, self.first_progress(decision, found), self._fingerprint)
        return [*messages, f"the checkpoint of the other run has the hash {origin.digest} (xxh3-64 of its state)"]

    def _rewind(self, decision: ResumeDecision, found: Checkpoint, origin: Origin) -> list[str]:
        """Move files of later steps away, and restore the best weights; return messages."""
        step, archive = origin.step, None
        if decision.begun is not None:
            archive = decision.begun.archive
        elif is_later(self._out, self._checkpoints, step):
            archive = self._checkpoints.next_archive()
        write_origins(self._out, replace(read_origins(self._out), rewind=replace(origin, archive=archive)))
        messages = []
        if archive is not None:
            moved = set_later_aside(self._out, self._checkpoints, step=step, archive=archive)
            messages.append(
                f"returning to step {step:,}: {', '.join(moved) or 'no further files'} moved to {self._out / archive}; "
                f"{METRICS_NAME} keeps the lines of later steps, which count as repeated steps"
            )
        return messages + restore_best_weights(self._checkpoints, self._weights, self._out, found)
