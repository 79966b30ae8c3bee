"""Recipe fragment: a TOML file of measured options, which training reads with --recipe."""

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

FIRST_LINE = "# Performance options measured by 'pipeline tune'; training reads this file with --recipe."
SECTIONS = {"compile": CompileConfig, "data.loader": LoaderOptions, "data.loader.dali": DaliOptions}


def recipe_fragment(choices: Mapping[str, Choice], conditions: Sequence[str]) -> str:
    """Return the TOML text: the chosen options, each below a comment with the measurements.

    Args:
        choices: choices by name of the option's field.
        conditions: lines that describe the measurement: command, device, versions, sizes.
    """
    lines = [FIRST_LINE, *(_comment(line) for line in conditions)]
    for section, config in SECTIONS.items():
        own = {field.name: choices[field.name] for field in fields(config) if field.name in choices}
        lines += ["", f"[{section}]"] if own else []
        for name, choice in own.items():
            if (figures := _comment(choice.reason)) != lines[-2]:  # options measured together share a comment
                lines.append(figures)
            lines.append(f"# {name}: not set" if choice.value is None else f"{name} = {json.dumps(choice.value)}")
    return "\n".join([*lines, ""])


def check_fragment_output(path: Path) -> None:
    """Check before measuring that the fragment can be written and would only replace an earlier fragment.

    Raises:
        OutputError: the file cannot be written, or it exists and is not a fragment.
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
    """Write the fragment to a file.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(path, text.encode(), "--out")


def _comment(line: str) -> str:
    """Format a one-line TOML comment, with credentials removed."""
    return f"# {printable(line)}"
