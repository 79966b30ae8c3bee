"""Every command and every Python example of README and docs works, on tiny data."""

import re
from pathlib import Path

import pytest

from docs.reference import COMMAND_CLASSES, options, sections
from launch.config.recipe import Recipe
from tests.docs.blocks import LANGUAGES, PAGES, Block, blocks, commands
from tests.docs.conftest import Shell
from tests.support import vision_libraries

# A word of a command line -> the options that may follow it.
OPTIONS: dict[str, set[str]] = {
    "launch/train.py": {"--recipe"} | {row.flag for _, kind in sections(Recipe) for row in options(kind)},
    **{command: {row.flag for row in options(kind, nested=True)} for command, kind in COMMAND_CLASSES.items()},
}
# Pages whose commands only `make test-all` runs, because other tests do the same in less time: convert and select data,
# resize progressively, export, fuse and count the models, train other models, fine-tune, distill, measure, check
# hosts, profile, report, and log to the trackers.
SLOW_PAGES = (
    *("data-selection", "dense-prediction", "distillation", "doctor", "fast-input", "fine-tuning", "imagenet"),
    *("loaders", "migrating", "model", "other-models", "performance", "profiling", "progressive-resizing", "report"),
    "trackers",
)
NEEDS_VISION_LIBRARIES = ("dense-prediction",)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW_PAGES)) for page in PAGES],
)
def test_commands_of_a_page_succeed(page: Path, folder: Path, shell: Shell) -> None:
    """Blocks run in order, in one folder; those that need a GPU, a cluster or a server are marked in the page."""
    setup = ""
    if page.stem in NEEDS_VISION_LIBRARIES:
        vision_libraries.require()
        setup = f"export PYTHONPATH=$PYTHONPATH:{vision_libraries.FOLDER}\n"
    script = folder / ".block.py"
    earlier = ""
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "bash":
            done = shell(setup + block.text, folder)
        else:
            earlier = f"{earlier}\n{block.text}" if block.marker == "continues" else block.text
            script.write_text(earlier)
            done = shell(f"{setup}python .block.py", folder)
        assert done.returncode == 0, f"{block}\n{block.text}\n--\n{done.stdout[-4000:]}"


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def test_blocks_name_their_language() -> None:
    unnamed = [str(block) for block in all_blocks() if block.language not in LANGUAGES]
    assert not unnamed, f"```LANGUAGE of {sorted(LANGUAGES)} expected: {unnamed}"


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.language == "bash"], ids=str)
def test_options_of_commands_exist(block: Block) -> None:
    """This also covers the blocks that are not run."""
    for words in commands(block):
        unknown = unknown_options(words)
        assert not unknown, f"{block}: {' '.join(words)}: no option {unknown}"


def unknown_options(words: list[str]) -> list[str]:
    """Return the options of a command line that its command does not have; only this project's commands are known."""
    line = " ".join(words)
    own, _, training = line.partition(" -- ")
    parts = [(own, next((name for name in OPTIONS if re.search(rf"(^|\s){re.escape(name)}(\s|$)", own)), None))]
    if training:
        parts.append((training, "launch/train.py"))
    unknown = []
    for part, name in parts:
        if name is None:
            continue
        given = re.findall(r"(?<=\s)--[a-z][a-z-]*", " " + part.split(name)[-1])
        unknown += [option for option in given if option.replace("--no-", "--") not in OPTIONS[name] | _positive(name)]
    return unknown


def _positive(name: str) -> set[str]:
    return {flag.replace("--no-", "--") for flag in OPTIONS[name]}


def test_unknown_options_are_found() -> None:
    assert unknown_options(["accelerate", "launch", "launch/train.py", "--varient", "b3"]) == ["--varient"]
    assert unknown_options(["pipeline", "bench", "SET", "--step", "3", "--", "--sizes", "2"]) == ["--step", "--sizes"]
    assert not unknown_options(["pipeline", "verify", "SET", "--workers", "2"])
