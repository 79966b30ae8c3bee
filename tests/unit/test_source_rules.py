"""Static checks that the source code follows the rules of docs/security.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "fat", "launch")

# Modules that may create or replace files, and why their paths do not come from untrusted data.
WRITERS = {
    "fat/kernels/prefill/compile_ahead.py": "lock in the kernel cache",
    "fat/kernels/prefill/compiler.py": "in a new temporary folder",
    "fat/weights/save.py": "path given by the caller; temporary name, then renamed",
    "launch/bench/chart.py": "into memory",
    "launch/deploy/export.py": "in a new folder next to --out, then renamed",
    "launch/run/checkpoint_folder.py": "in a new folder of RUN/checkpoints",
    "launch/resilience/heartbeat.py": "RUN/heartbeat; temporary name, then renamed",
    "pipeline/storage/memory_cache/shared_pixels.py": "memory of this process, or that rank 0 names in /proc",
    "launch/run/metrics_file.py": "RUN/metrics.jsonl, appended to if it is a regular file",
    "launch/machine/rank_errors.py": "TORCHELASTIC_ERROR_FILE, which the launcher of this process has set",
    "launch/machine/simple_launcher.py": "/dev/tty",
    "launch/monitor/curves.py": "into memory",
    "launch/report/charts.py": "into memory",
    "launch/run/files.py": "probe under a random name",
    "launch/machine/standard_streams.py": "/dev/null",
    "launch/run/status.py": "RUN/status",
    "launch/resilience/watchdog.py": "RUN/stacks-rankN.txt, appended to if it is a regular file",
    "pipeline/storage/cache/cache.py": "recorded files of the cache's own folder; their names are validated",
    "pipeline/storage/cache/eviction.py": "recorded files of the cache's own folder",
    "pipeline/storage/cache/folder.py": "lock of the cache's own folder",
    "pipeline/storage/cache/record.py": "record of the cache's own folder",
    "shards/command.py": "/dev/null",
    "shards/convert/write_beton.py": "work folder of the set",
    "shards/files/durable.py": "the one way to write a file: temporary name, then renamed; callers choose the path",
    "shards/files/lock.py": "lock of the work folder",
    "shards/files/output.py": "path given as an option; special files only, others by durable_write",
    "shards/files/private_folder.py": "inside a folder whose owner and mode were checked",
    "shards/commands/samples.py": "new folder given as an option; fixed names",
}
_MODES = set("wax+")
_WRITING_CALLS = {"write_text", "write_bytes", "savefig", "save_file", "savez", "copyfile", "copytree", "mkstemp"}


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def swallowing_handlers(tree: ast.Module) -> list[int]:
    """Return the lines of handlers for all exceptions that neither raise, use, nor log the exception."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
        if node.type is not None and not names & {"Exception", "BaseException"}:
            continue
        inside = [child for statement in node.body for child in ast.walk(statement)]
        raises = any(isinstance(child, ast.Raise) for child in inside)
        looks = any(isinstance(child, ast.Name) and child.id == node.name for child in inside)
        logs = any(isinstance(child, ast.keyword) and child.arg == "exc_info" for child in inside)
        if not (raises or looks or logs):
            lines.append(node.lineno)
    return lines


def temporary_literals(tree: ast.Module) -> list[int]:
    """Return the lines with a literal path below /tmp, /var/tmp, or /dev/shm, except in docstrings."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
        and node.value.startswith(("/tmp", "/var/tmp", "/dev/shm"))
    ]


def writing_calls(tree: ast.Module) -> list[int]:
    """Return the lines with a call that creates or replaces a file."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        constants = [value.value for value in values if isinstance(value, ast.Constant)]
        modes = [
            value for value in constants if isinstance(value, str) and len(value) <= 3 and set(value) <= set("rwaxbt+")
        ]
        writes = name in _WRITING_CALLS or (name in ("open", "fdopen") and any(set(mode) & _MODES for mode in modes))
        if writes:
            lines.append(node.lineno)
    flags = {"O_CREAT", "O_WRONLY", "O_RDWR", "O_TRUNC"}
    lines += [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in flags]
    return sorted(set(lines))


def test_no_handler_silently_ignores_all_exceptions() -> None:
    found = {file: lines for file, tree in _sources() if (lines := swallowing_handlers(tree))}
    assert not found


TEMPORARY_FOLDERS = {
    "shards/files/temporary.py": "creates a private folder with a random name",
    "launch/config/run.py": "default of --local-checkpoint-dir, in which a private folder is created",
    "launch/doctor/measurements/node.py": "only reads how large /dev/shm is",
    "launch/doctor/tables.py": "the title of a column",
}


def test_no_literal_paths_to_shared_temporary_folders() -> None:
    found = {file for file, tree in _sources() if temporary_literals(tree)}
    assert found == TEMPORARY_FOLDERS.keys()


def test_files_are_written_only_by_known_modules() -> None:
    found = {file: lines for file, tree in _sources() if (lines := writing_calls(tree))}
    unknown = {file: lines for file, lines in found.items() if file not in WRITERS}
    advice = "check that the paths do not come from untrusted data, then add the module to WRITERS"
    assert not unknown, f"new modules write files: {advice}"
    assert not set(WRITERS) - set(found), "these modules no longer write files"


def test_the_checks_detect_violations() -> None:
    tree = ast.parse(
        "try: f()\nexcept Exception: pass\n"
        "try: f()\nexcept Exception as error: log(error)\n"
        "p = '/tmp/x'\n"
        "open(p, 'w')\nopen(p)\nq.write_text('')\nos.open(p, os.O_RDWR | os.O_CREAT)\n"
    )
    assert swallowing_handlers(tree) == [2]
    assert temporary_literals(tree) == [5]
    assert writing_calls(tree) == [6, 8, 9]
