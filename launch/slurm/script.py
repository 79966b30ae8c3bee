"""Render launch/slurm/train.sbatch for a job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config.recipe import Recipe
from launch.slurm.job import ROOT, Submit, SubmitError, fits

TEMPLATE = Path(__file__).with_name("train.sbatch")
# What #SBATCH lines hold without quotes; sbatch ends an option at a space and a line at '#'.
PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
SETTINGS, END_OF_SETTINGS = "# ---- settings\n", "# ---- end of settings\n"


def render(job: Submit, recipe: Recipe, training: Sequence[str]) -> str:
    """The sbatch script: #SBATCH lines and settings from `job`, the rest as the template has it.

    Every value arrives unchanged, whatever characters it holds; the shell's lines are quoted by `shlex`.

    Raises:
        SubmitError: sizes that do not fit, or a value that an #SBATCH line or a container's option cannot hold.
    """
    run = recipe.run.out.absolute()
    head, settings, rest = TEMPLATE.read_text(encoding="utf-8").partition(SETTINGS)
    body = rest.partition(END_OF_SETTINGS)[2]
    title = head.splitlines()[1]
    runner = _container(job, recipe)
    lines = [
        "#!/bin/bash",
        title,
        "# Rendered by launch.submit; launch/slurm/train.sbatch explains each line.",
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
    """sbatch's options."""
    # No --ntasks-per-node: with it SLURM finds that MIN nodes suffice, and gives no more.
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
    """An option as a line of #SBATCH holds it: sbatch takes a backslash as an escape within all quotes, which a shell
    does not.

    Raises:
        SubmitError: it would end the line, or be seen by the terminal instead of the reader.
    """
    if PLAIN.fullmatch(option):
        return option
    if any(ord(character) < ord(" ") or character == "\x7f" for character in option):
        raise SubmitError(f"{option}: control characters cannot stand in an #SBATCH line; use another name")
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _pattern(run: Path) -> str:
    """A folder as --output holds it, where % begins a placeholder.

    Raises:
        SubmitError: it holds a backslash, which switches placeholders off.
    """
    if "\\" in str(run):
        raise SubmitError(f"--out {run}: a backslash cannot stand in the name of SLURM's log; use another folder")
    return str(run).replace("%", "%%")


def _container(job: Submit, recipe: Recipe) -> list[str]:
    """What runs a command in the container: options of srun (Pyxis), or a command (Apptainer); [] without one."""
    if job.container is None:
        return []
    folders = [ROOT, Path.cwd(), recipe.run.out.absolute()]
    data = recipe.data.location()
    if isinstance(data, Path):
        folders.append(data.absolute())
    for place, forbidden in (*((str(folder), ",:") for folder in folders), *((mount, ",") for mount in job.mount)):
        if any(character in place for character in forbidden):
            raise SubmitError(f"{place}: a container's mount cannot hold a comma or a colon; use another folder")
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
