"""Phrases and names that this project has abandoned do not come back."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.language.draw import PACKAGES, ROOT, prose
from tests.language.phrases import NAMES, PHRASES

BRITISH = re.compile(
    "(amort|custom|equal|final|general|initial|memor|minim|maxim|neutral|normal|optim|organ|parallel|poster|quant"
    "|random|real|recogn|regular|sanit|serial|special|summar|synchron|token|util|vector|visual)is(e|ing|ation)"
    "|analyse|behaviour|catalogue|centre|colour|favour|grey|honour|labell|licence|misspelt|neighbour|towards"
    "|\\bdistil\\b",
    re.IGNORECASE,
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """Return (file and line, text) of every comment, docstring, message and paragraph."""
    found = [(f"{piece.file}:{piece.line}", piece.text) for piece in prose((*PACKAGES, "tests"))]
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            found.append((f"{page.relative_to(ROOT)}:{number}", line))
    return [(place, " ".join(text.replace("#", " ").split())) for place, text in found if "tests/language" not in place]


@pytest.mark.parametrize("phrase", PHRASES)
def test_abandoned_phrases_do_not_occur(phrase: str, texts: list[tuple[str, str]]) -> None:
    pattern = re.compile(phrase, re.IGNORECASE)
    found = [f"{place}: ...{match[0]}..." for place, text in texts if (match := pattern.search(text))]
    assert not found, f"write '{PHRASES[phrase]}' instead:\n" + "\n".join(found)


def test_words_and_names_have_american_spelling(texts: list[tuple[str, str]]) -> None:
    """The spelling of the libraries' names: normalize, initialize, color, center, gray."""
    found = [f"{place}: {match[0]}" for place, text in texts if (match := BRITISH.search(text))]
    for folder in (*PACKAGES, "tests"):
        found += [f"{path}:{line}: {word}" for path, word, line in names_in(folder) if BRITISH.search(word)]
    assert not found


def test_abandoned_names_do_not_occur() -> None:
    found = []
    for folder in PACKAGES:
        for path, word, line in names_in(folder):
            if any(word in names and is_below(path, scope) for scope, names in NAMES.items()):
                found.append(f"{path}:{line}: {word}")
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "What a recipe leaves open about speed, and what it comes to",
        "a download that was broken off is gone on with",
        "goes on where it was",
        "refuses what cannot be, first of all",
        "must go without ceremony",
        "other ones every time",
        "All of it.",
        "are said aloud",
        "Take back what `state_dict` gave, on every rank alike",
    ],
)
def test_each_example_of_private_language_is_caught(text: str) -> None:
    assert any(re.search(phrase, text, re.IGNORECASE) for phrase in PHRASES)


def test_defined_names_are_found() -> None:
    tree = ast.parse("def mend(story): weigh = 1\nclass Need: picks: int\nfor share in x: y.guilty = 1")
    assert {name for name, _ in defined_names(tree)} == {"mend", "story", "weigh", "Need", "picks", "share", "guilty"}


@functools.cache
def names_in(folder: str) -> list[tuple[Path, str, int]]:
    """Return (file, name, line) of all that the modules of a folder define."""
    return [
        (path.relative_to(ROOT), word, line)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for word, line in defined_names(ast.parse(path.read_text()))
    ]


def defined_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of all that a module defines: functions, classes, arguments, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def is_below(path: Path, scope: str) -> bool:
    return not scope or path == Path(scope) or Path(scope) in path.parents
