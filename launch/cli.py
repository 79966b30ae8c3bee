"""The `pipeline` command. Each subcommand is a frozen dataclass of its options with a `run` method."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from launch.machine.standard_streams import open_missing_streams
from shards.interrupt import exit_on_interrupt, interruptible

if Path(sys.argv[0]).name == "pipeline" or __name__ == "__main__":
    open_missing_streams()  # before the pipe for signals, which would get the descriptor of a closed stream
    exit_on_interrupt()  # during imports; the installed script imports this file

import tyro
from annotated_types import Interval
from tyro.conf import subcommand

from launch.bench.options import Bench
from launch.capacity.options import Capacity
from launch.deploy.export_command import Export
from launch.deploy.predict import Predict
from launch.doctor.options import Doctor
from launch.race.options import Race
from launch.recipes.command import Recipes
from launch.report.command import Report
from launch.start.processes import ProcessCount
from launch.tuning.options import Tune
from pipeline.look import Look
from shards.command import check_options, check_subcommand, main_program, option_names
from shards.commands.command_line import Index, SampleDigits, SamplePhotos, Shard
from shards.commands.inspect import Info, Verify
from shards.cores import limit_openmp
from shards.errors import UserError, open_files_error, report
from shards.open_files import raise_limit
from shards.option_help import default
from shards.ranges import check_ranges
from shards.redact import printable, protect_output


@dataclass(frozen=True)
class Sample:
    """Create a small real data set as an ImageNet-like folder."""

    what: (
        Annotated[SampleDigits, subcommand("digits", prefix_name=False)]
        | Annotated[SamplePhotos, subcommand("photos", prefix_name=False)]
    )

    def run(self) -> int:
        return self.what.run()


@dataclass(frozen=True)
class Goodput:
    """Show how much of a run's wall time was training, over all its starts, and where the rest went."""

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(name="run", metavar="RUN")]]
    """Run folder: --out of the training."""
    json: bool = False
    """Print JSON instead of tables, with the names of ml-goodput-measurement."""

    def run(self) -> int:
        import json

        from launch.monitor.goodput_table import describe, read_goodput

        found = read_goodput(self.run_folder, lambda message: print(f"warning: {printable(message)}", file=sys.stderr))
        if self.json:
            print(json.dumps(found.to_dict(), indent=1))
        else:
            print(*map(printable, describe(found).splitlines()), sep="\n")
        return 0


@dataclass(frozen=True)
class Train:
    """Train on the GPUs of this machine, or of several: start a process of launch/train.py for each.

    The options of the training follow after `--`; 'pipeline train -- --help' lists them. Example:
    pipeline train --processes 8 -- --variant b3 --data SET
    """

    processes: ProcessCount = None
    """Number of processes per machine."""
    hosts: Annotated[tuple[str, ...], default("this machine")] = ()
    """Machines to train on, which this one can reach with ssh without a password. They need this project, its Python
    and the run folder at the same paths. On a SLURM cluster, use 'python -m launch.submit' instead."""
    ssh: str = "ssh"
    """Command for --hosts, such as 'ssh -p 2222' or 'ssh -F FILE'."""
    port: Annotated[int, Interval(ge=1, le=65535)] = 29500
    """Port of the first of the hosts, at which the processes find each other."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, training: Sequence[str] = ()) -> int:
        if self.hosts:
            from launch.start.hosts import train_on_hosts
            from launch.start.ssh import Hosts

            return train_on_hosts(Hosts(self.hosts, tuple(shlex.split(self.ssh))), self.processes, self.port, training)
        from launch.start.processes import start_training

        return start_training(self.processes, training)


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "shard": Shard,
    "index": Index,
    "verify": Verify,
    "info": Info,
    "look": Look,
    "train": Train,
    "recipes": Recipes,
    "race": Race,
    "doctor": Doctor,
    "bench": Bench,
    "capacity": Capacity,
    "tune": Tune,
    "goodput": Goodput,
    "report": Report,
    "predict": Predict,
    "export": Export,
    "sample": Sample,
}


SAMPLES: dict[str, type] = {"digits": SampleDigits, "photos": SamplePhotos}


DESCRIPTION = """Create, verify, view and measure shard sets for training vision backbones, and train on them.

pipeline COMMAND --help lists the options of a command, and pipeline --version prints the versions."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit status (docs/troubleshooting.md).

    0: done, 1: failed, 2: invalid input, 130: interrupted.
    """
    return interruptible(lambda: _main(list(sys.argv[1:] if args is None else args)))


def _main(args: list[str]) -> int:
    protect_output()
    limit_openmp()
    raise_limit()
    end = args.index("--") if "--" in args else len(args)
    own, training = args[:end], args[end + 1 :]
    return main_program(lambda: _run(own, training), own)


def _run(args: Sequence[str], training: Sequence[str]) -> int:
    try:
        _check_names(args)
        command = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS, args=args, prog="pipeline", description=DESCRIPTION, config=(tyro.conf.OmitArgPrefixes,)
        )
        if isinstance(command, Bench | Race | Train | Tune):
            return command.run(training)
        if training:
            raise UserError(
                f"-- {' '.join(training)}: only 'train', 'race', 'bench' and 'tune' accept training options after --; "
                "omit them"
            )
        if isinstance(command, Doctor):
            return command.run(list(args[1:]))
        return int(command.run())
    except UserError as error:
        return report(error)
    except Exception as error:
        if (known := open_files_error(error)) is None:
            raise
        return report(known)


def _check_names(args: Sequence[str]) -> None:
    """Raise UserError for a misspelled subcommand or option."""
    if not args or args[0].startswith("-"):
        return
    check_subcommand(args[0], SUBCOMMANDS, command="pipeline")
    command, kind = f"pipeline {args[0]}", SUBCOMMANDS[args[0]]
    if kind is Sample:
        if len(args) < 2 or args[1].startswith("-"):
            return
        check_subcommand(args[1], SAMPLES, command=command)
        command, kind = f"{command} {args[1]}", SAMPLES[args[1]]
    elsewhere = {}
    if kind in (Bench, Race, Train, Tune):
        from launch.config.recipe import Recipe

        example = f"{command} {'' if kind is Train else 'SET '}-- --variant b3"
        advice = f"a training option; write training options after --: {example}"
        elsewhere[advice] = option_names(Recipe) | {"--recipe"}
    check_options(args, option_names(kind), command=command, elsewhere=elsewhere)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
