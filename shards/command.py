"""Conventions of all commands: --version, suggestions for misspelled names, colors, and readers that stop early."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import platform
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import tyro

from shards.errors import StorageFailed, UserError, report
from shards.redact import printable

CLOSED_PIPE = 141  # exit status that shells report for a process ended by SIGPIPE (128 + SIGPIPE)
PROJECT = "fat-pipeline"
SOURCE_VERSION = Path(__file__).resolve().parents[1] / "pyproject.toml"
# Options that tyro adds to every command.
BUILT_IN = ("--help", "--version", "--tyro-print-completion", "--tyro-write-completion")


def main_program(command: Callable[[], int], args: Sequence[str]) -> int:
    """Run a command line, and flush its output; return the exit status.

    With --version, print the versions instead. A reader that has exited, as in `pipeline info SET | head`, ends the
    command without a message; output that cannot be written for another reason is an error.

    Args:
        args: arguments of the command, without those after `--`.

    Raises:
        SystemExit: --help, or options that tyro rejects.
    """
    # tyro has no such setting of its own, and looks at standard output only.
    plain = "NO_COLOR" in os.environ or not all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
    tyro._experimental_options["ansi_codes"] = not plain
    try:
        try:
            if "--version" in args:
                print(version_line())
                return 0
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at exit, Python would report a failure with status 120
    except (OSError, SystemExit) as error:
        if (status := failed_output(error)) is None:
            raise
        return status


def failed_output(error: BaseException) -> int | None:
    """Handle an error of writing to standard output or error; return the exit status, or None for another error."""
    # rich ends the program when its output is closed.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError):
        status = CLOSED_PIPE
    elif (
        isinstance(cause, OSError)
        and cause is error
        and cause.filename is None
        and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    ):
        status = report(
            StorageFailed(f"the output cannot be written ({cause.strerror}); free some space, then start again")
        )
    else:
        return None
    for stream in (sys.stdout, sys.stderr):  # discard what is buffered, which Python would try to write at exit
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def version_line() -> str:
    """Return the versions of the project, of PyTorch and of Python on one line."""
    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        torch = "torch is not installed"
    return f"{PROJECT} {project_version()} ({torch}, Python {platform.python_version()})"


def project_version() -> str:
    """Return the version of this project: of the installed package, else of the source checkout."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        import tomllib

        return str(tomllib.loads(SOURCE_VERSION.read_text(encoding="utf-8"))["project"]["version"])


def check_subcommand(name: str, known: Collection[str], *, command: str) -> None:
    """Raise UserError for an unknown subcommand, with the most similar one."""
    if name not in known:
        raise UserError(
            f"{name}: no such subcommand of '{command}'{suggestion(name, known)} (expected one of {', '.join(known)})"
        )


def check_options(
    args: Sequence[str], known: Collection[str], *, command: str, elsewhere: Mapping[str, Collection[str]] | None = None
) -> None:
    """Check the names of options before tyro parses their values.

    tyro reports a misspelled option as a missing argument if the command has positional arguments.

    Args:
        known: options of the command (`option_names`).
        elsewhere: advice -> options that are valid in another place.

    Raises:
        UserError: unknown option; the message contains the most similar one.
    """
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if not name.startswith("--") or name == "--" or name in known or name in BUILT_IN:
            continue
        for advice, options in (elsewhere or {}).items():
            if name in options:
                raise UserError(f"{name}: {advice}")
        similar = suggestion(name, [*known, "--help"])
        raise UserError(f"{name}: no such option of '{command}'{similar} ('{command} --help' lists all options)")


def suggestion(name: str, known: Collection[str]) -> str:
    """Return "; did you mean X?" for the most similar known name, or an empty text."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {printable(found[0])}?" if found else ""


def option_names(kind: type) -> set[str]:
    """Return the options of a dataclass, and of the dataclasses in its fields, such as --global-batch."""
    names: set[str] = set()
    plain, hints = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = plain[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            names |= option_names(hint)
            continue
        metadata = _metadata(hints[field.name])
        if tyro.conf.Positional in metadata:
            continue
        name = next((entry.name for entry in metadata if getattr(entry, "name", None)), field.name).replace("_", "-")
        names |= {f"--{name}", f"--no-{name}"} if hint is bool else {f"--{name}"}
    return names


def _metadata(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is not Annotated:
        return []
    base, *metadata = typing.get_args(hint)
    return metadata + _metadata(base)
