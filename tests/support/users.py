"""Run code as another user of the machine."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534


def needs_root() -> None:
    """Skip the test unless this process can change its user."""
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")


@contextmanager
def public_folder(mode: int = 0o1777) -> Iterator[Path]:
    """Yield a folder that all users can access, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def as_user(uid: int, do: Callable[[], Any], *, groups: Sequence[int] = (), umask: int = 0o022) -> Any:
    """Call `do` in a forked process of that user; return its result, or the exception that it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.umask(umask)
            os.setgroups(list(groups))
            os.setgid(uid)
            os.setuid(uid)
            try:
                result = do()
            except Exception as error:
                result = error
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    return pickle.loads(content)
