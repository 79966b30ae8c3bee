"""With a low limit of open files, commands use fewer files or tell the user to increase the limit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import StorageFailed, explain_os_errors, open_files_error, storage_error
from shards.open_files import open_file_budget
from tests.support.launching import python_path
from tests.support.users import NOBODY, as_user, needs_root, public_folder

FULL = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def limited(soft: int, hard: int, code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process with these limits of open files."""
    env = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}
    command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


COMMAND = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
RAISED = """
import resource, sys
{start}
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(soft, hard)
"""
STARTS = {
    "a command": "from launch.cli import main; main(['info', 'nowhere'])",
    "a rank": "from launch.machine.world import run_command; run_command(lambda: 0)",
}


@pytest.mark.parametrize(
    ("start", "soft", "hard", "expected"),
    [("a command", 48, 512, 512), ("a rank", 48, 20000, 4096), ("a command", 8000, 9000, 8000)],
)
def test_a_command_increases_its_soft_limit(start: str, soft: int, hard: int, expected: int) -> None:
    assert limited(soft, hard, RAISED.format(start=STARTS[start])).stdout.split() == [str(expected), str(hard)]


READ = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from pipeline.storage.files import LocalFiles
from shards.open_files import open_file_budget

taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(int(sys.argv[2]))]  # files of other components
files = LocalFiles([Path(sys.argv[1]) / str(n) for n in range(300)])

def first_byte(n):
    target = np.empty(1, np.uint8)
    files.read(n, target, 0)
    return int(target[0])

with ThreadPoolExecutor(16) as pool:
    assert list(pool.map(first_byte, range(300))) == [n % 256 for n in range(300)]
assert files.open_count <= 16, files.open_count
print("read")
"""


@pytest.mark.parametrize("taken", [0, 53], ids=["alone", "with other files open"])
def test_a_reader_of_many_files_keeps_few_of_them_open(tmp_path: Path, taken: int) -> None:
    for n in range(300):
        (tmp_path / str(n)).write_bytes(bytes([n % 256]))
    done = limited(64, 64, READ, tmp_path, str(taken))
    assert done.stdout == "read\n", done.stderr


@pytest.mark.parametrize(
    ("limit", "command"),
    [
        (32, ["verify", "--workers", "2"]),
        (12, ["verify", "--workers", "2"]),
        pytest.param(32, ["look", "--size", "32", "--out", "l.png"], marks=pytest.mark.slow),
        pytest.param(6, ["look", "--size", "32"], marks=pytest.mark.slow),
        (12, ["info"]),
    ],
)
def test_a_command_works_or_reports_the_limit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = limited(limit, limit, COMMAND, command[0], digits, *command[1:])
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.returncode == 1
        assert f"Too many open files, the limit is {limit}" in done.stderr
        assert f"'ulimit -n' allows {limit} at most" in done.stderr


def test_too_many_open_files_is_a_storage_failure() -> None:
    judged = storage_error("a.tar", FULL)
    assert isinstance(judged, StorageFailed)
    assert re.fullmatch(
        r"a.tar: cannot be read \(Too many open files, the limit is \d+\); increase the limit \('ulimit -n.*\), "
        "then start again",
        str(judged),
    )
    machine = storage_error("a.tar", OSError(errno.ENFILE, os.strerror(errno.ENFILE)))
    assert (machine.exit_code, "fs.file-max" in str(machine)) == (1, True)
    with pytest.raises(Exception, match=r"ulimit -n.*to resume"), explain_os_errors(Path("out")):
        raise FULL


@pytest.mark.parametrize(
    ("soft", "hard", "advice"),
    [(64, 4096, "'ulimit -n 1024'"), (2000, 9000, "'ulimit -n 4000'"), (2000, 3000, "allows 3000 at most")],
)
def test_a_sufficient_limit_is_recommended(soft: int, hard: int, advice: str) -> None:
    """It is never lower than the current limit, because `ulimit -n` also sets the hard limit."""
    output = limited(soft, hard, "from shards.open_files import how_to_raise_limit; print(how_to_raise_limit())")
    assert advice in output.stdout, output.stderr


def broken_handler() -> BaseException:
    try:
        try:
            raise FULL
        except OSError:
            {}["bug"]
    except KeyError as error:
        return error
    raise AssertionError


def chained() -> BaseException:
    try:
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("no index") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, True),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), True),
        (chained(), True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), False),
        (ValueError("no such image"), False),
        (broken_handler(), False),
    ],
)
def test_errors_of_libraries_are_recognized(error: BaseException, expected: bool) -> None:
    assert (open_files_error(error) is not None) == expected


def test_each_component_gets_a_part_of_the_limit() -> None:
    code = "from shards.open_files import open_file_budget; print(open_file_budget(256), open_file_budget(8))"
    assert limited(64, 64, code).stdout.split() == ["16", "8"]
    assert limited(1024, 1024, code).stdout.split() == ["256", "8"]
    assert open_file_budget(1) == 1


def test_the_message_about_an_unreadable_file_names_its_owner() -> None:
    needs_root()
    with public_folder() as folder:
        file, closed = folder / "a.tar", folder / "closed"
        file.write_bytes(b"x")
        file.chmod(0o640)
        closed.mkdir(mode=0o700)

        def message(path: Path) -> str:
            try:
                path.read_bytes()
            except OSError as error:
                return f"{storage_error(path, error).exit_code} {storage_error(path, error)}"
            return "read"

        ask = "ask its owner for access (chmod, chgrp), then start again"
        assert as_user(NOBODY, lambda: message(file)) == (
            f"1 {file}: cannot be read (Permission denied for user nobody: a file of user root, group root, mode "
            f"0640); {ask}"
        )
        assert as_user(NOBODY, lambda: message(closed / "b.tar")) == (
            f"1 {closed}/b.tar: cannot be read (Permission denied for user nobody: {closed} is a folder of user root, "
            f"group root, mode 0700); {ask}"
        )
        assert as_user(54321, lambda: message(file)).startswith(
            f"1 {file}: cannot be read (Permission denied for user 54321: a file of user root"
        )
