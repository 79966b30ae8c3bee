"""Mutation testing (`make mutants`): change one operator, number or argument at a time; a unit test must fail.

campaign.toml lists the source files, the unit tests of each, and the mutants that are equivalent to the original.
mutmut mutates copies of the tree under build/mutants/, so that an interrupted campaign leaves no mutated source behind.

    python -m tests.mutation.campaign [--workers N] [FILE ...]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "build" / "mutants"
PACKAGES = ("shards", "pipeline", "fat", "launch")
MUTMUT = (sys.executable, "-m", "mutmut")
PYTEST_OPTIONS = (
    "-n0",
    "--hypothesis-profile=mutation",
    "-p",
    "no:cacheprovider",
    "-m",
    "not gpu and not slow and not timed",
)


@dataclass(frozen=True)
class Result:
    """Results for one source file."""

    mutants: int
    """Total number of mutants."""
    timeouts: int
    """Mutants whose tests timed out, for example because of an endless loop; they count as killed."""
    equivalent: int
    """Surviving mutants that campaign.toml lists as equivalent."""
    survivors: dict[str, str]
    """All other surviving mutants: mutmut's name -> changed lines."""
    stale: list[str]
    """Entries of campaign.toml that match no surviving mutant."""


def main() -> int:
    config = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="source files (default: all in campaign.toml)")
    parser.add_argument("--workers", type=int, default=2, help="mutants tested in parallel (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.files) - set(config):
        parser.error(f"{', '.join(sorted(unknown))}: not in campaign.toml, which lists {', '.join(config)}")
    results = {source: campaign(source, config[source], arguments.workers) for source in arguments.files or config}
    print(f"\n{'file':<34}{'mutants':>8}{'killed':>8}{'(timeouts)':>12}{'equivalent':>12}{'survived':>10}")
    for source, result in results.items():
        killed = result.mutants - result.equivalent - len(result.survivors)
        counts = f"{result.mutants:>8}{killed:>8}{f'({result.timeouts})':>12}{result.equivalent:>12}"
        print(f"{source:<34}{counts}{len(result.survivors):>10}")
    for source, result in results.items():
        for name, lines in result.survivors.items():
            print(f"\n{source}: survived: {name}\n    {lines}")
        for lines in result.stale:
            print(f"\n{source}: listed as equivalent, but not among the survivors:\n    {lines}")
    return 1 if any(result.survivors or result.stale for result in results.values()) else 0


def campaign(source: str, config: dict[str, Any], workers: int) -> Result:
    """Run mutmut on one source file, given relative to the repository root."""
    folder = SCRATCH / source.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    deselected = [f"--deselect=tests/unit/{test}" for test in config.get("deselect", [])]
    settings = {
        "source_paths": PACKAGES,
        "only_mutate": [source],
        # Fork workers from a process that has not run tests, because threads of torch and DALI do not survive a fork.
        "process_isolation": ["forkserver"],
        "pytest_add_cli_args": [*PYTEST_OPTIONS, *deselected],
        "pytest_add_cli_args_test_selection": [f"tests/unit/{test}" for test in config["tests"]],
    }
    lines = [f"{key} = " + "\n    ".join(values) + "\n" for key, values in settings.items()]
    (folder / "setup.cfg").write_text("[mutmut]\n" + "".join(lines), encoding="utf-8")
    print(f"{source}:", flush=True)
    subprocess.run([*MUTMUT, "run", "--max-children", str(workers)], cwd=folder, check=True)
    status = dict(line.split(": ") for line in _output("results", "--all", "true", cwd=folder).splitlines())
    survivors = {
        name.strip(): changed_lines(_output("show", name.strip(), cwd=folder))
        for name, outcome in status.items()
        if outcome not in ("killed", "timeout")
    }
    equivalent = [mutant for group in config.get("equivalent", []) for mutant in group["mutants"]]
    unlisted = {name: lines for name, lines in survivors.items() if lines not in equivalent}
    return Result(
        mutants=len(status),
        timeouts=list(status.values()).count("timeout"),
        equivalent=len(survivors) - len(unlisted),
        survivors=unlisted,
        stale=[lines for lines in equivalent if lines not in survivors.values()],
    )


def changed_lines(diff: str) -> str:
    """Return the changed lines of a diff as one line: `- before + after`."""
    lines = [line for line in diff.splitlines() if line.startswith(("-", "+")) and not line.startswith(("---", "+++"))]
    return " ".join(f"{line[0]} {' '.join(line[1:].split())}" for line in lines)


def _output(*arguments: str, cwd: Path) -> str:
    return subprocess.run([*MUTMUT, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
