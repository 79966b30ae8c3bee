"""Write measured options as a recipe fragment: a TOML file that training takes with --recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from launch.config.engine import CompileConfig
from launch.tuning.trials import Choice
from pipeline.options import DaliOptions, LoaderOptions
from shards.files.output import OutputError, check_output, write_output
from shards.redact import printable

FIRST_LINE = "# Performance options measured by 'pipeline tune'; training takes this file with --recipe."
SECTIONS = {"compile": CompileConfig, "data.loader": LoaderOptions, "data.loader.dali": DaliOptions}


def recipe_fragment(choices: Mapping[str, Choice], conditions: Sequence[str]) -> str:
    """Return the TOML text: the options that have a value, each below what was measured.

    Args:
        choices: by the name of the option's field.
        conditions: lines that say what was measured, and on what.
    """
    lines = [FIRST_LINE, *(_comment(line) for line in conditions)]
    for section, config in SECTIONS.items():
        own = {field.name: choices[field.name] for field in fields(config) if field.name in choices}
        lines += ["", f"[{section}]"] if own else []
        for name, choice in own.items():
            if (figures := _comment(choice.reason)) != lines[-2]:  # options that go together share them
                lines.append(figures)
            lines.append(f"# {name}: left open" if choice.value is None else f"{name} = {json.dumps(choice.value)}")
    return "\n".join([*lines, ""])


def check_fragment_output(path: Path) -> None:
    """Check before the measurement that the fragment can be written, and replaces nothing but an earlier one.

    Raises:
        OutputError: it cannot be written, or the file exists and is not a fragment.
    """
    check_output(path, "--out")
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            is_fragment = file.read(len(FIRST_LINE)) == FIRST_LINE.encode()
    except OSError as error:
        raise OutputError(f"--out {path}: cannot be read ({error.strerror}); name another file") from error
    if not is_fragment:
        raise OutputError(f"--out {path}: exists and was not written by 'pipeline tune'; name another file")


def write_fragment(path: Path, text: str) -> None:
    """Write the fragment.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(path, text.encode(), "--out")


def _comment(line: str) -> str:
    """A comment without credentials, on one line."""
    return f"# {printable(line)}"
