"""Decide from which checkpoint a start resumes. Only reads, so that `--dry-run` can show the decision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.config.errors import RecipeError
from launch.config.resume import FORMS, WORDS, ResumeOption
from launch.run.checkpoint import META, NAME, Checkpoint, CheckpointError, DamagedCheckpoint, open_checkpoint
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.origin import ORIGIN_NAME, Origin, Origins, read_origins
from shards.command import suggestion

_LISTED = 12  # steps that a message lists
_NEWEST = ("last", "latest", "newest")  # words of other programs for auto


@dataclass(frozen=True, kw_only=True)
class ResumeDecision:
    """What a start begins with."""

    kind: Literal["never", "new", "newest", "rewind", "branch"]
    """never = `--resume never`; new = the run folder has no checkpoints; newest = its newest undamaged checkpoint;
    rewind = a chosen checkpoint of the run folder; branch = a checkpoint of another run."""
    run: Path
    """Run folder of the checkpoint."""
    request: str = ""
    """Value of `--resume` with an absolute path, for rewind and branch."""
    checkpoint: Path | None = None
    """Folder of the chosen checkpoint; None: the newest undamaged one of `run`."""
    begun: Origin | None = None
    """What an earlier start did not complete, and this one completes."""
    messages: tuple[str, ...] = ()

    @property
    def resumes(self) -> bool:
        """Whether the start resumes from a checkpoint, unless all are damaged."""
        return self.kind in ("newest", "rewind", "branch")

    def describe(self, found: Checkpoint, out: Path) -> str:
        """Return a message about the checkpoint from which a start in the run folder `out` resumes."""
        if self.kind == "branch":
            return f"branching from step {found.progress.step:,} of {found.path} into {out}"
        return f"resuming from {found.path}"

    def open(self) -> tuple[Checkpoint, list[str]]:
        """Open and verify the checkpoint of a rewind or a branch; return it and warnings.

        Raises:
            CheckpointError: the checkpoint is damaged, or is not the one that an earlier start used.
            StorageFailed: it cannot be read.
        """
        option, warnings = f"--resume {self.request}", []
        if self.checkpoint is None:
            newest, skipped = CheckpointFolder(self.run / CHECKPOINTS).newest()
            if newest is None:
                raise CheckpointError(f"{option}: all checkpoints of this run are damaged; choose another run")
            found, warnings = newest, [f"warning: {message}" for message in skipped]
        else:
            try:
                found = open_checkpoint(self.checkpoint)
            except DamagedCheckpoint as error:
                raise CheckpointError(f"{option}: {error}; choose another checkpoint") from error
        if self.begun is not None and found.state.xxh3 != self.begun.digest:
            raise CheckpointError(
                f"{found.path}: differs from the checkpoint that an earlier start of the run began to use; restore it, "
                "or use another run folder (--out)"
            )
        return found, warnings


def decide_resume(out: Path, resume: str) -> ResumeDecision:
    """Decide from which checkpoint a start resumes.

    Args:
        out: run folder; it need not exist.
        resume: value of `--resume`.

    Raises:
        UserError: the chosen checkpoint does not exist, or the run folder has another history.
        StorageFailed: a folder of checkpoints cannot be read.
    """
    option = ResumeOption.parse(resume)
    if option.kind == "never":
        return ResumeDecision(kind="never", run=out)
    if option.kind == "path":
        option = _of_this_run(out, option)
    request = resume if option.kind != "path" else os.path.realpath(option.path)
    request = f"step:{option.step}" if option.kind == "step" else request
    origins, own = read_origins(out), CheckpointFolder(out / CHECKPOINTS)
    if (begun := origins.pending) is not None:
        return _completing(out, begun, request, automatic=option.kind == "auto")
    if option.kind == "auto":
        return _newest(out, own, origins)
    done = origins.made_by(request)
    if done is not None and not own.is_empty():
        again = "" if done is origins.branch else f"; to return to it again, remove {out / ORIGIN_NAME} first"
        what = "branched from" if done is origins.branch else "returned to"
        message = (
            f"--resume {resume}: this run has {what} step {done.step:,} already, so it resumes from its newest "
            f"checkpoint{again}"
        )
        return ResumeDecision(kind="newest", run=out, messages=(message,))
    if option.kind == "path":
        return _branch(out, own, option.path, request, origins)
    return _rewind(out, own, option, request)


def _newest(out: Path, own: CheckpointFolder, origins: Origins) -> ResumeDecision:
    if out.is_dir() and not own.is_empty():  # a path that cannot be a run folder is reported when it is created
        return ResumeDecision(kind="newest", run=out)
    if origins.branch is None:
        return ResumeDecision(kind="new", run=out)
    return branch_again(origins.branch)


def branch_again(branch: Origin) -> ResumeDecision:
    """Return the decision for a run that began with a checkpoint of another run, and has none of its own left."""
    path = Path(branch.checkpoint)
    return ResumeDecision(
        kind="branch", run=_run_of(path), request=branch.request, checkpoint=path, begun=branch,
        messages=(f"the run folder has no checkpoints left, so the run branches again from {path}",),
    )  # fmt: skip


def _completing(out: Path, begun: Origin, request: str, *, automatic: bool) -> ResumeDecision:
    """Return the decision to complete what an earlier start began, which may have moved some files.

    Raises:
        CheckpointError: `--resume` chooses another checkpoint.
    """
    path = out / begun.checkpoint  # an absolute path remains as it is
    branch = Path(begun.checkpoint).is_absolute()
    what = f"branching from {path}" if branch else f"returning to step {begun.step:,}"
    if not automatic and request != begun.request:
        raise CheckpointError(
            f"--resume {request}: an earlier start was interrupted while {what}; start once with --resume auto, which "
            f"completes this, or use another run folder (--out)"
        )
    return ResumeDecision(
        kind="branch" if branch else "rewind", run=_run_of(path), request=begun.request, checkpoint=path, begun=begun,
        messages=(f"an earlier start was interrupted while {what}; completing this",),
    )  # fmt: skip


def _rewind(out: Path, own: CheckpointFolder, option: ResumeOption, request: str) -> ResumeDecision:
    paths = own.paths()
    if not paths:
        raise CheckpointError(f"--resume {request}: {out} has no checkpoints; omit the option to start a run there")
    messages: list[str] = []
    step: int | None = option.step
    if option.kind == "best":
        readable, messages = own.readable()
        step = max((meta.progress.step for meta in readable if meta.progress.is_best), default=None)
        if step is None:
            raise CheckpointError(
                f"--resume best: no checkpoint of {out} is marked as the best, because none was evaluated with a top-1 "
                f"accuracy above 0 yet; use step:N with one of the steps {_listed(list(paths))}"
            )
    if step not in paths:
        raise CheckpointError(
            f"--resume {request}: {out} has no checkpoint of step {step:,}; it has those of the steps "
            f"{_listed(list(paths))} (--save-every and --keep decide which are kept)"
        )
    return ResumeDecision(
        kind="rewind", run=out, request=request, checkpoint=paths[step],
        messages=tuple(f"warning: {message}" for message in messages),
    )  # fmt: skip


def _branch(out: Path, own: CheckpointFolder, path: Path, request: str, origins: Origins) -> ResumeDecision:
    try:
        run, checkpoint = _located(path)
    except OSError as error:  # a name that is too long, or a folder that this user cannot open
        raise RecipeError(f"--resume {path}: cannot be opened ({error.strerror}); expected {FORMS}") from error
    if not own.is_empty():
        began = "from the beginning"
        if origins.branch is not None:
            began = f"with step {origins.branch.step:,} of {origins.branch.checkpoint}"
        raise CheckpointError(
            f"--resume {path}: {out} has checkpoints of another history, which began {began}; use a new run folder "
            "(--out) to branch, or --resume auto to continue the run in this folder"
        )
    return ResumeDecision(kind="branch", run=run, request=request, checkpoint=checkpoint)


def _of_this_run(out: Path, option: ResumeOption) -> ResumeOption:
    """Return step:N for the path of a checkpoint in this run folder, and auto for that of the folder itself."""
    path, own = Path(os.path.realpath(option.path)), Path(os.path.realpath(out))
    if path == own or path == own / CHECKPOINTS:
        return ResumeOption("auto")
    step = NAME.fullmatch(path.name)
    return ResumeOption("step", step=int(step[1])) if step and path.parent == own / CHECKPOINTS else option


def _located(path: Path) -> tuple[Path, Path | None]:
    """Return the run folder that `--resume PATH` names, and the checkpoint folder; None: its newest checkpoint.

    Raises:
        RecipeError: there is neither a checkpoint nor a run folder with checkpoints at the path.
        OSError: the path cannot be opened.
    """
    if not path.is_dir():
        raise RecipeError(_no_folder(path))
    resolved = Path(os.path.realpath(path))
    if NAME.fullmatch(resolved.name) or (resolved / META).exists():
        return _run_of(resolved), resolved
    run = resolved.parent if resolved.name == CHECKPOINTS else resolved
    if CheckpointFolder(run / CHECKPOINTS).is_empty():
        raise RecipeError(
            f"--resume {path}: contains no checkpoints; expected a checkpoint folder, such as "
            "RUN/checkpoints/step-00001234, or a run folder that has checkpoints"
        )
    return run, None


def _no_folder(path: Path) -> str:
    """Return the error message for a path at which there is no folder."""
    text = str(path)
    if path.exists():
        advice = "; to start from a weights file, use --weights" if path.suffix == ".safetensors" else ""
        return f"--resume {text}: is a file; expected the path of a checkpoint folder or a run folder{advice}"
    digits = text.removeprefix("step").lstrip("-=_ ")
    hint = f"; did you mean step:{int(digits)}?" if digits.isascii() and digits.isdecimal() else ""
    if not hint and len(path.parts) == 1:
        hint = "; did you mean auto?" if text.lower() in _NEWEST else suggestion(text.lower(), WORDS)
    return f"--resume {text}: no such folder{hint} (expected {FORMS})"


def _run_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint folder."""
    return checkpoint.absolute().parents[1]


def _listed(steps: Sequence[int]) -> str:
    """Return the newest steps as a list in words, in ascending order."""
    texts = [f"{step:,}" for step in steps[-_LISTED:]]
    more = f"({len(steps) - _LISTED} earlier ones), " if len(steps) > _LISTED else ""
    return more + (f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else "".join(texts))
