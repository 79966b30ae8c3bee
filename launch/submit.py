"""Submit a training run to SLURM: `python -m launch.submit --nodes 4 -- --variant b3 --data SET`.

Checks the recipe here, before the queue; renders `launch/slurm/train.sbatch` into the run folder, shows and submits it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.run.files import unwritable
from pipeline.plan import BatchShape, PlanError, divisors
from shards.errors import UserError, report
from shards.files.durable import durable_write
from shards.ranges import check_ranges
from shards.redact import printable, protect_output, redact

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).resolve().parent / "slurm" / "train.sbatch"
MAX_NODES = 10_000
INTERRUPTED = 130  # as shells report a process ended by Ctrl-C
# As sbatch has them: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
TIME = re.compile(r"\d{1,9}(:\d{1,2}){0,2}|\d{1,5}-\d{1,2}(:\d{1,2}){0,2}|unlimited|infinite", re.ASCII | re.IGNORECASE)
# What #SBATCH lines hold without quotes; sbatch ends an option at a space and a line at '#'.
PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
SETTINGS, END_OF_SETTINGS = "# ---- settings\n", "# ---- end of settings\n"


class SubmitError(UserError):
    """A job that cannot be submitted as asked."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit a training run to SLURM. What stands after `--` goes to launch/train.py (its --help lists it)."""

    nodes: str = "1"
    """N, or MIN-MAX: each start takes what is free between them, as far as the global batch can be dealt out to it."""
    gpus_per_node: Annotated[int, Interval(ge=0, le=1024)] = 8
    """GPUs, and processes, per node; 0 = a cluster without GPUs, see --processes-per-node."""
    processes_per_node: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """Processes per node. None = one per GPU."""
    partition: str | None = None
    """SLURM's partition."""
    time: str | None = None
    """Time limit of one start, such as 24:00:00. At its end the run saves and goes back into the queue."""
    account: str | None = None
    """SLURM's account."""
    cpus_per_node: Annotated[int, Interval(ge=1, le=65535)] | None = None
    """Cores per node. None = whole nodes (--exclusive), with all their cores and memory."""
    name: str | None = None
    """Name of the job. None = the run folder's."""
    container: str | None = None
    """Image that holds Python and all libraries: a .sif file (Apptainer), or what Pyxis takes."""
    mount: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folders (FROM or FROM:TO) to see in the container, besides the project, the run folder and the data."""
    python: str | None = None
    """Python on the nodes. None = this one, or python3 in a container."""
    script: Path = ROOT / "launch" / "train.py"
    """What each process runs."""
    setup: str = ""
    """Shell line run first on each node, such as 'module load cuda'. It is kept in the script: no passwords."""
    restarts: Annotated[int, Interval(ge=0, le=1_000_000)] = 3
    """Starts after a crash or stall that brings no new checkpoint, before the job ends."""
    warn_seconds: Annotated[int, Interval(ge=0, le=65535)] = 180
    """Seconds before the time limit at which SLURM warns the job, which then saves and leaves."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """More options of sbatch, such as --sbatch=--qos=high --sbatch=--constraint=h100."""
    dry_run: bool = False
    """Show the script; write and submit nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", self.nodes, re.ASCII) or not (
            self.bounds[0] <= self.bounds[1] <= MAX_NODES
        ):
            raise SubmitError(
                f"--nodes {self.nodes}: a number as in 4, or MIN-MAX as in 2-8, up to {MAX_NODES:,} expected"
            )
        if self.processes < 1:
            raise SubmitError(
                f"--gpus-per-node {self.gpus_per_node}, --processes-per-node {self.processes_per_node}: "
                "at least one process per node expected"
            )
        if self.time and not TIME.fullmatch(self.time):
            raise SubmitError(f"--time {self.time}: a time as sbatch has it, such as 24:00:00 or 2-12, expected")

    @property
    def bounds(self) -> tuple[int, int]:
        """(fewest, most) nodes."""
        first, _, last = self.nodes.partition("-")
        return int(first), int(last or first)

    @property
    def processes(self) -> int:
        """Per node."""
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node


@dataclass(frozen=True)
class Fit:
    """What is used of a number of nodes."""

    given: int
    used: int
    processes: int
    """Per node."""

    @property
    def world(self) -> int:
        return self.used * self.processes


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 submitted (or shown), 2 bad input, or SLURM refused."""
    protect_output()
    args = list(sys.argv[1:] if args is None else args)
    split = args.index("--") if "--" in args else len(args)
    training = args[split + 1 :]  # those of launch/train.py
    try:
        _refuse_credentials(args)
        job = tyro.cli(Submit, args=args[:split], description=Submit.__doc__)
        recipe = parse(training)
        script = render(job, recipe, training)
        print(script)
        if job.dry_run:
            return 0
        path = write(script, recipe.run.out.absolute())
        number = submit(path)
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"submitted job {number}: {printable(path)}")
    print(f"log:          {printable(path.parent / f'job-{number}.out')}")
    print(f"save, leave and go back into the queue:  scancel --signal=USR2 --batch {number}")
    print(f"save and end:                            scancel {number}")
    return 0


def _refuse_credentials(args: Sequence[str]) -> None:
    """Reject credentials, because other users may read the script, before it is shown or written.

    Raises:
        SubmitError: an argument holds a URL with a password or a signature.
    """
    for arg in args:
        if redact(arg) != arg:
            raise SubmitError(
                f"{arg}: a URL with credentials would be kept in the job's script; leave them out and use the "
                "environment or the configuration of the storage library (fsspec) on the nodes"
            )


def write(script: str, run: Path) -> Path:
    """Put the script into the run folder; returns its path.

    Raises:
        UserError: the folder cannot be written.
    """
    path = run / "slurm" / "train.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable_write(path, os.fsencode(script))  # keep paths that are not UTF-8 unchanged
    except OSError as error:
        raise unwritable(run, error) from error
    return path


def submit(script: Path) -> int:
    """Hand a script to sbatch; returns the job's number.

    Raises:
        SubmitError: no sbatch here, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(f"sbatch is not on this machine's PATH; on a login node run: sbatch {script}")
    command = ["sbatch", "--parsable", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number.isdecimal():
        raise SubmitError(f"sbatch refused {script}: {' '.join((done.stderr or done.stdout).split())}")
    return int(number)


def fits(recipe: Recipe, job: Submit) -> list[Fit]:
    """For each number of nodes that may be given, the largest world size on them that the global batch allows.

    Raises:
        SubmitError: a fixed number of nodes does not fit; the message names what would.
    """
    low, high = job.bounds
    if low == high:
        try:
            _shape(recipe, high * job.processes)
        except PlanError as error:
            raise SubmitError(f"--nodes {high} x {job.processes} processes: {error}") from None
    return _largest(recipe, range(low, high + 1), job.processes)


def _largest(recipe: Recipe, counts: range, per_node: int) -> list[Fit]:
    """The largest possible world on each number of nodes, and on as few of them as hold it: less traffic."""
    possible = []
    for world in reversed(divisors(recipe.data.global_batch)):
        used = next((nodes for nodes in divisors(world) if world // nodes <= per_node), world)
        if used > counts[-1]:
            continue
        try:
            _shape(recipe, world)
        except PlanError:
            continue
        possible.append((used, world))
    found = []
    for nodes in counts:
        fit = next((fit for fit in possible if fit[0] <= nodes), None)
        if fit is None:
            raise SubmitError(
                f"--global-batch {recipe.data.global_batch}: no number of processes up to {nodes * per_node} fits"
            )
        used, world = fit
        found.append(Fit(nodes, used, world // used))
    return found


def _shape(recipe: Recipe, world: int) -> BatchShape:
    data = recipe.data
    return BatchShape(
        global_batch=data.global_batch, world=world, micro_batch=data.micro_batch, pairs=data.augmentation().mixes
    )


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
        f"FITS=({shlex.join(f'{fit.given}:{fit.used}:{fit.processes}' for fit in fits(recipe, job))})",
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


if __name__ == "__main__":
    sys.exit(main())
