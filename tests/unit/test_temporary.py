"""If TMPDIR, HOME or caches cannot be used, another folder is used or a one-line error names the variable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.files.temporary import prepare_caches
from tests.support.launching import python_path
from tests.support.users import NOBODY, as_user, needs_root, public_folder

COMMAND = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
SOCKETS = (
    "import multiprocessing.util as m; from shards.files.temporary import *; prepare_sockets(); print(m.get_temp_dir())"
)
ONE_LINE = """
import sys
from shards.errors import UserError, report
from shards.files.temporary import *
try:
    {call}
except UserError as error:
    sys.exit(report(error))
"""
LONGEST = 75


def python(
    code: str, *args: str | Path, before: list[str] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP", *env)}
    environment |= {"PYTHONPATH": python_path(), **env}
    command = [*(before or []), sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def folder_of_length(root: Path, length: int) -> Path:
    folder = root / ("t" * (length - len(os.fsencode(root)) - 1))
    folder.mkdir()
    assert len(os.fsencode(folder)) == length
    return folder


def test_a_command_with_workers_runs_with_a_long_tmpdir(digits: Path, tmp_path: Path) -> None:
    with public_folder() as root:
        done = python(COMMAND, "verify", digits, "--workers", "2", TMPDIR=str(folder_of_length(root, 120)))
    assert (done.returncode, "no faults, every byte was checked" in done.stdout) == (0, True), done.stderr
    assert done.stderr.count("note: TMPDIR=") == 1
    assert "path too long for sockets; creating sockets in /" in done.stderr


@pytest.mark.parametrize(("length", "fits"), [(LONGEST, True), (LONGEST + 1, False)])
def test_sockets_are_in_tmpdir_if_the_path_is_short_enough(length: int, fits: bool) -> None:
    with public_folder() as root:
        folder = folder_of_length(root, length)
        done = python(SOCKETS, TMPDIR=str(folder), XDG_RUNTIME_DIR="")
        made = Path(done.stdout.strip())
        assert (made.parent == folder, done.stderr == "") == (fits, fits)
        assert not made.exists(), "removed when the process ends"


def test_a_missing_tmpdir_is_reported_once() -> None:
    done = python(
        "from shards.files.temporary import *; print(temporary_folder(), temporary_folder())", TMPDIR="/no/such"
    )
    first, second = done.stdout.split()
    assert first == second != "/no/such"
    assert done.stderr == f"note: TMPDIR=/no/such cannot be written; using {first} for temporary files\n"
    assert python("from shards.files.temporary import *; temporary_folder()", TMPDIR=first).stderr == ""


@pytest.mark.parametrize(
    ("call", "writable"), [("temporary_folder()", False), ("prepare_sockets()", False), ("prepare_sockets()", True)]
)
def test_without_any_writable_folder_the_error_names_the_variable(call: str, writable: bool) -> None:
    needs_root()
    places = ("/tmp", "/var/tmp", *(() if writable else ("/dev/shm",)))
    close = [f"mount --bind {place} {place} && mount -o remount,bind,ro {place}" for place in places]
    inside = " && ".join([*close, 'cd /proc && exec "$0" "$@"'])
    before = ["unshare", "--mount", "sh", "-c", inside]
    done = python(ONE_LINE.format(call=call), before=before, TMPDIR="/no/such", XDG_RUNTIME_DIR="")
    assert "Traceback" not in done.stderr
    if writable:
        assert done.returncode == 0, done.stderr
        assert "note: TMPDIR=/no/such: no folder for temporary files" in done.stderr
        assert done.stderr.endswith("creating sockets in /dev/shm\n")
        return
    assert done.returncode == 2
    assert done.stderr.startswith("error: TMPDIR=/no/such: no folder for temporary files can be written")
    assert "set TMPDIR to a folder that you can write to" in done.stderr


ENVIRONMENT = ("HOME", "XDG_CACHE_HOME", "TRITON_HOME", "TRITON_CACHE_DIR", "TMPDIR")


def caches(uid: int, **env: str) -> tuple[str | None, str | None]:
    """Return (XDG_CACHE_HOME, TRITON_HOME) after `prepare_caches`, for a user with only these variables."""

    def prepare() -> tuple[str | None, str | None]:
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ.update(env)
        prepare_caches()
        return os.environ.get("XDG_CACHE_HOME"), os.environ.get("TRITON_HOME")

    found = as_user(uid, prepare)
    if isinstance(found, Exception):
        raise found
    return found


def test_a_user_without_a_usable_home_gets_a_private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root()
    with public_folder() as tmp:
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        own = tmp / "fat-pipeline-cache-54321"
        for env in ({}, {"HOME": "/nonexistent"}, {"HOME": "/root"}, {"XDG_CACHE_HOME": "/root/cache"}):
            assert caches(54321, **env) == (str(own), str(own)), env
        found = own.stat()
        assert (found.st_uid, found.st_mode & 0o777) == (54321, 0o700)


def test_a_cache_that_is_a_dangling_link_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """~/.cache is a link to a scratch disk that is not mounted on this node."""
    needs_root()
    with public_folder() as tmp:
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        home = tmp / "home"
        home.mkdir(mode=0o777)
        home.chmod(0o777)
        (home / ".cache").symlink_to("/nonexistent/cache")
        assert caches(54321, HOME=str(home))[0] == str(tmp / "fat-pipeline-cache-54321")


def test_a_writable_home_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root()
    with public_folder() as tmp:
        monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
        assert caches(54321, HOME=str(tmp)) == (None, None)
        assert caches(54321, HOME=str(tmp / "made" / "later")) == (None, None)
        cache = str(tmp / "cache")
        assert caches(54321, HOME="/nonexistent", XDG_CACHE_HOME=cache) == (cache, cache), "Triton ignores it"


def test_a_cache_folder_of_another_user_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root()
    with public_folder() as tmp:
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        (tmp / "fat-pipeline-cache-54321").mkdir()
        os.chown(tmp / "fat-pipeline-cache-54321", NOBODY, NOBODY)
        with pytest.raises(UserError, match=r"fat-pipeline-cache-54321: .*set XDG_CACHE_HOME to a folder that you own"):
            caches(54321, HOME="/nonexistent")
