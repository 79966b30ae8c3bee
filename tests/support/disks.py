"""Small and full disks, for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small tmpfs at `folder`. The test is skipped if this process cannot mount file systems.

    Args:
        folder: mount point, which is created; it is unmounted at the end.
        size: size of the tmpfs, such as "64k".
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        assert not (os.environ.get("CI") == "true" and os.getuid() == 0), "root must be able to mount a tmpfs"
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to the last byte, like other programs; return the file to remove."""
    filler = disk / "of-others"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler
