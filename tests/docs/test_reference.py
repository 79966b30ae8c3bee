"""The pages of options are current, and mention every option."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from docs.reference import (
    COMMAND_CLASSES,
    commands_page,
    field_docstrings,
    metrics_page,
    options,
    sections,
    training_page,
)
from launch.config.recipe import Recipe
from launch.run.metrics_schema import KINDS
from tests.docs.blocks import ROOT


@pytest.mark.parametrize(
    ("page", "render"),
    [("training-options", training_page), ("commands", commands_page), ("metrics-fields", metrics_page)],
)
def test_generated_page_is_current(page: str, render: Callable[[], str]) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text() == render(), "run: python docs/reference.py"


def test_every_option_has_a_help_text() -> None:
    classes = [kind for _, kind in sections(Recipe)] + list(COMMAND_CLASSES.values())
    assert not [f"{kind.__name__}: {row.flag}" for kind in classes for row in options(kind) if not row.help]


def test_every_field_of_metrics_is_described() -> None:
    fields = [(kind, name) for kind in set(KINDS.values()) for name in kind.model_fields if name != "kind"]
    assert not [f"{kind.__name__}.{name}" for kind, name in fields if not field_docstrings(kind).get(name)]
    page = metrics_page()
    assert not [name for name in {name for _, name in fields} | KINDS.keys() if f"`{name}`" not in page]


def test_training_page_has_every_option_of_the_command_line() -> None:
    """Compare with what tyro shows: an option class that the page leaves out is noticed here."""
    command = [sys.executable, "launch/train.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    on_command_line = set(re.findall(r"│ (--[a-z0-9-]+)", shown)) | {"--recipe"}
    on_page = set(re.findall(r"^\| `(--[a-z0-9-]+)`", training_page(), re.MULTILINE))
    assert {flag.replace("--no-", "--") for flag in on_page} == on_command_line
