"""Rendering of launch/slurm/train.sbatch for a job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config.recipe import Recipe
from launch.config.resume import ResumeOption
from launch.run.checkpoint import NAME
from launch.run.checkpoint_folder import CHECKPOINTS
from launch.slurm.job import ROOT, Submit, SubmitError, fits

TEMPLATE = Path(__file__).with_name("train.sbatch")
# Options that an #SBATCH line can hold without quotes: sbatch ends an option at a space, and the line at '#'.
PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
SETTINGS, END_OF_SETTINGS = "# ---- settings\n", "# ---- end of settings\n"
RENDERED = "# Rendered by launch.submit"  # begins a line of every rendered script


def render(job: Submit, recipe: Recipe, training: Sequence[str]) -> str:
    """Return the sbatch script: the #SBATCH lines and settings of `job`, followed by the body of the template.

    Values may contain any characters: `shlex` quotes them for the shell.

    Raises:
        SubmitError: the global batch does not allow the number of processes, or a value cannot be represented in an
            #SBATCH line or in an option of the container runtime.
    """
    run = recipe.run.out.absolute()
    head, settings, rest = TEMPLATE.read_text(encoding="utf-8").partition(SETTINGS)
    body = rest.partition(END_OF_SETTINGS)[2]
    title = head.splitlines()[1]
    runner = _container(job, recipe)
    lines = [
        "#!/bin/bash",
        title,
        f"{RENDERED}; launch/slurm/train.sbatch explains each line.",
        *(f"#SBATCH {_quoted(option)}" for option in _options(job, run)),
        "",
        settings.rstrip(),
        f"RUN={shlex.quote(str(run))}",
        f"WORKDIR={shlex.quote(str(Path.cwd()))}",
        f"PYTHON={shlex.quote(job.python or ('python3' if job.container else sys.executable))}",
        f"SCRIPT={shlex.quote(str(job.script.absolute()))}",
        f"PROCESSES={job.processes}",
        f"FITS=({shlex.join(':'.join(map(str, fit)) for fit in fits(recipe, job))})",
        f"RESTARTS={job.restarts}",
        f"SETUP={shlex.quote(job.setup)}",
        f"SRUN=({shlex.join(runner if runner and runner[0].startswith('--') else [])})",
        f"EXEC=({shlex.join(runner if runner and not runner[0].startswith('--') else [])})",
        f"ARGS=({shlex.join(training)})",
        END_OF_SETTINGS.rstrip(),
        "",
    ]
    return "\n".join(lines) + body


def _options(job: Submit, run: Path) -> list[str]:
    """Return the options for sbatch."""
    # --ntasks-per-node is omitted: with it, SLURM would allocate MIN nodes even if more are free.
    options = [f"--job-name={job.name or run.name}", f"--nodes={job.nodes}"]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    options += [f"--cpus-per-task={job.cpus_per_node}"] if job.cpus_per_node else ["--exclusive", "--mem=0"]
    options += [
        f"--{name}={value}"
        for name, value in (("partition", job.partition), ("account", job.account), ("time", job.time))
        if value
    ]
    options += [
        f"--signal=B:USR2@{job.warn_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={_pattern(run)}/slurm/job-%j.out",
    ]
    return options + list(job.sbatch)


def _quoted(option: str) -> str:
    """Quote an option for an #SBATCH line.

    Unlike a shell, sbatch treats a backslash as an escape character within single quotes too.

    Raises:
        SubmitError: the option contains control characters, which would end the line or be interpreted by a terminal.
    """
    if PLAIN.fullmatch(option):
        return option
    if any(ord(character) < ord(" ") or character == "\x7f" for character in option):
        raise SubmitError(f"{option}: an #SBATCH line cannot contain control characters; use another name")
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _pattern(run: Path) -> str:
    """Escape a folder name for sbatch's --output, in which % starts a placeholder.

    Raises:
        SubmitError: the name contains a backslash, which would disable the placeholders.
    """
    if "\\" in str(run):
        raise SubmitError(f"--out {run}: the path of SLURM's log cannot contain a backslash; use another folder")
    return str(run).replace("%", "%%")


def _container(job: Submit, recipe: Recipe) -> list[str]:
    """Return arguments that run a command in the container: options of srun (Pyxis) or a command prefix (Apptainer).

    Returns an empty list without a container.
    """
    if job.container is None:
        return []
    folders = [ROOT, Path.cwd(), recipe.run.out.absolute()]
    data = recipe.data.location()
    if isinstance(data, Path):
        folders.append(data.absolute())
    resume = ResumeOption.parse(recipe.checkpoint.resume)
    if resume.kind == "path":
        chosen = resume.path.absolute()
        # The run folder of a checkpoint has the recipe and the names of the classes.
        in_run = NAME.fullmatch(chosen.name) and chosen.parent.name == CHECKPOINTS
        folders.append(chosen.parents[1] if in_run else chosen)
    for path, forbidden in (*((str(folder), ",:") for folder in folders), *((mount, ",") for mount in job.mount)):
        if any(character in path for character in forbidden):
            raise SubmitError(f"{path}: a container mount cannot contain a comma or colon; use another folder")
    mounts = [
        *(f"{folder}:{folder}" for folder in dict.fromkeys(folders)),
        *(m if ":" in m else f"{m}:{m}" for m in job.mount),
    ]
    if job.container.endswith(".sif"):
        gpu = ["--nv"] if job.gpus_per_node else []
        return ["apptainer", "exec", *gpu, "--pwd", str(Path.cwd()), "--bind", ",".join(mounts), job.container]
    return [
        f"--container-image={job.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={Path.cwd()}",
    ]
