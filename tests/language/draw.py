"""Draw comments and messages at random, for a review of their language.

    python tests/language/draw.py --count 40 --seed 1

Prints `--count` comments (docstrings among them) and as many messages (errors, warnings, log lines, help texts) of the
packages, each with its file and line. A reviewer who does not know the code judges whether each is plain standard
English. `prose()` yields all of them; tests/language/test_language.py searches them for phrases that STYLE.md rejects.
"""

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
PACKAGES = ("fat", "shards", "pipeline", "launch", "benchmarks", "examples")
# Functions and methods whose string arguments a user reads.
SPEAKERS = {"debug", "info", "warning", "error", "exception", "critical", "print", "log", "write", "warn", "exit"}

# Comments for tools, without words for a reader.
PRAGMA = re.compile(r"# ((type: ignore|noqa)(\[[^]]*\])?(: \w+(, \w+)*)?( +# noqa: \w+)?|fmt: \w+)")

Kind = Literal["comment", "message"]


@dataclass(frozen=True)
class Prose:
    """A piece of English in the code."""

    kind: Kind
    file: Path  # relative to the repository
    line: int
    text: str

    def __str__(self) -> str:
        shown = [*self.text.splitlines(), *([f"[code] {self.code()}"] if self.kind == "comment" else [])]
        return f"{self.file}:{self.line}\n    " + "\n    ".join(shown)

    def code(self) -> str:
        """Return the line of code that a comment or docstring is about: its own, the next or the previous one."""
        lines = (ROOT / self.file).read_text().splitlines()
        own = lines[self.line - 1].strip()
        if not self.text.startswith("#"):  # a docstring
            return lines[self.line - 2].strip() if self.line > 1 else ""
        following = self.line - 1 + len(self.text.splitlines())
        return own if not own.startswith("#") else lines[following].strip() if following < len(lines) else ""


def prose(folders: tuple[str, ...] = PACKAGES) -> Iterator[Prose]:
    """Yield every comment, docstring and message in the Python files of the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            name = path.relative_to(ROOT)
            yield from comments(name, source)
            tree = ast.parse(source)
            yield from docstrings(name, tree)
            yield from messages(name, tree)


def comments(file: Path, source: str) -> Iterator[Prose]:
    """Yield the comments; successive lines of comment are one."""
    block: list[str] = []
    first = last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or PRAGMA.fullmatch(token.string):
            continue
        line, start = token.start
        alone = not token.line[:start].strip()
        if block and alone and line == last + 1 and start == column:
            block.append(token.string)
        else:
            if block:
                yield Prose("comment", file, first, "\n".join(block))
            block, first = [token.string], line
        last, column = line, start if alone else -1
    if block:
        yield Prose("comment", file, first, "\n".join(block))


def docstrings(file: Path, tree: ast.Module) -> Iterator[Prose]:
    """Yield the docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            value = getattr(child, "value", None)
            if isinstance(child, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield Prose("comment", file, child.lineno, value.value.strip())


def messages(file: Path, tree: ast.Module) -> Iterator[Prose]:
    """Yield the strings that are raised, logged, printed, or shown as help."""
    for node in ast.walk(tree):
        spoken: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            spoken = list(node.exc.args)
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in SPEAKERS:
                spoken = list(node.args)
            spoken += [key.value for key in node.keywords if key.arg in ("help", "description", "epilog")]
        for text in filter(None, (text_of(argument) for argument in spoken)):
            if " " in text.strip():
                yield Prose("message", file, node.lineno, text)


def text_of(node: ast.expr) -> str:
    """Return the text of a string expression, with `{...}` for what is filled in; "" for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) or text_of(node.orelse)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="comments, and messages, to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", nargs="+", default=list(PACKAGES))
    options = parser.parse_args()
    found = list(prose(tuple(options.folders)))
    for kind in ("comment", "message"):
        pool = [piece for piece in found if piece.kind == kind]
        drawn = random.Random(options.seed).sample(pool, min(options.count, len(pool)))
        print(f"\n== {len(drawn)} of {len(pool)} {kind}s ==\n")
        for number, piece in enumerate(drawn, 1):
            print(f"{number}. {piece}\n")


if __name__ == "__main__":
    main()
