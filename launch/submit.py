"""Submit a training run to SLURM: `python -m launch.submit --nodes 4 -- --variant b3 --data SET`.

Validates the recipe before the job is queued, renders `launch/slurm/train.sbatch` into the run folder, prints it and
submits it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.machine.standard_streams import open_missing_streams
from shards.interrupt import exit_on_interrupt, interruptible

if __name__ == "__main__":
    open_missing_streams()  # before the pipe for signals, which would get the descriptor of a closed stream
    exit_on_interrupt()  # during imports

import tyro

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.resilience.foreign_files import check_run_folder
from launch.run.files import read_regular, unwritable
from launch.slurm.checks import check_training
from launch.slurm.job import Submit, SubmitError
from launch.slurm.script import RENDERED, render
from shards.command import check_options, main_program, option_names
from shards.errors import UserError, report
from shards.files.durable import durable_write
from shards.redact import printable, protect_output, redact

PROG = "python -m launch.submit"
_MAX_SCRIPT = 1 << 20  # bytes of an existing script that are read


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 submitted or shown, 2 invalid input or rejected by SLURM."""
    protect_output()
    args = list(sys.argv[1:] if args is None else args)
    split = args.index("--") if "--" in args else len(args)
    own, training = args[:split], args[split + 1 :]  # `training`: the options of launch/train.py
    return main_program(lambda: _run(own, training), own)


def _run(args: Sequence[str], training: Sequence[str]) -> int:
    try:
        _reject_credentials([*args, *training])
        elsewhere = {"a training option; write training options after --": option_names(Recipe) | {"--recipe"}}
        check_options(args, option_names(Submit), command=PROG, elsewhere=elsewhere)
        job = tyro.cli(Submit, args=args, prog=PROG, description=Submit.__doc__)
        own = {"an option of the job, not of training; write it before --": option_names(Submit)}
        recipe = parse(training, prog=f"{PROG} --", elsewhere=own)
        script = render(job, recipe, training)
        for warning in check_training(job, recipe):
            print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)
        print(script)
        if job.dry_run:
            return 0
        path = write(script, recipe.run.out.absolute())
        number = submit(path)
    except UserError as error:
        return report(error)
    print(f"submitted job {number}: {printable(path)}")
    print(f"log:               {printable(path.parent / f'job-{number}.out')}")
    print(f"save and requeue:  scancel --signal=USR2 --batch {number}")
    print(f"save and end:      scancel {number}")
    return 0


def _reject_credentials(args: Sequence[str]) -> None:
    """Reject credentials before the script, which other users may be able to read, is printed or written.

    Raises:
        SubmitError: an argument contains a URL with a password or a signature.
    """
    for arg in args:
        if redact(arg) != arg:
            raise SubmitError(
                f"{arg}: credentials in a URL would be saved in the job's script; remove them, and set them in the "
                "environment or the configuration of the storage library (fsspec) on the nodes"
            )


def write(script: str, run: Path) -> Path:
    """Write the script to the run folder; return its path.

    Raises:
        UserError: the folder cannot be written, or it has files that another program wrote.
    """
    check_run_folder(run)
    path = run / "slurm" / "train.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and RENDERED.encode() not in read_regular(path, limit=_MAX_SCRIPT):
            raise SubmitError(f"{path}: exists and was not written by '{PROG}'; move it away")
        durable_write(path, os.fsencode(script))  # paths need not be valid UTF-8
    except OSError as error:
        raise unwritable(run, error) from error
    return path


def submit(script: Path) -> int:
    """Submit a script with sbatch; return the job id.

    Raises:
        SubmitError: sbatch is not on the PATH, or it rejected the script.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(f"sbatch is not on the PATH of this machine; on a login node run: sbatch {script}")
    command = ["sbatch", "--parsable", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number.isdecimal():
        raise SubmitError(f"sbatch rejected {script}: {' '.join((done.stderr or done.stdout).split())}")
    return int(number)


if __name__ == "__main__":
    sys.exit(interruptible(main))
