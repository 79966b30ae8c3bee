"""Read the fenced code blocks of Markdown pages.

A block is run as it stands unless an HTML comment on the line before its fence says why not:

    <!-- not run: needs a GPU -->

`<!-- continues -->` before a Python block runs it after the previous Python block of the page, in the same interpreter.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "text", "toml", "json", "yaml"}

_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_MARKER = re.compile(r"<!-- (not run: .+|continues) -->")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of the opening fence
    language: str
    text: str
    marker: str  # "not run: REASON", "continues", or ""

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.marker.startswith("not run")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if not opening:
            number += 1
            continue
        indent, language = opening.groups()
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end])
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        marker = _MARKER.search(before)
        yield Block(page, number + 1, language, text, marker.group(1) if marker else "")
        number = end + 1


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the commands of a bash block as words, without comments; continued lines are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if words:
            yield words
