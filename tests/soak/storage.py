"""Shared storage that can be full or slow: an ext4 file system in a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.disks import fill

# From linux/fs.h: all writes to a frozen file system block until it is thawed.
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
FROZEN_SECONDS, THAWED_SECONDS = (0.2, 0.9), (0.05, 0.3)


class Storage:
    """Shared storage of all nodes, mounted at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler: Path | None = None
        self._ends, self._thread = threading.Event(), threading.Thread()

    def fill(self) -> None:
        """Fill the storage to the last byte."""
        self._filler = fill(self.folder)

    def free(self) -> None:
        """Remove the file of `fill`."""
        if self._filler is not None:
            self._filler.unlink(missing_ok=True)
        self._filler = None

    def slow_down(self, draw: random.Random) -> None:
        """Let every write take up to a second: block all writes again and again, with short pauses."""
        self.speed_up()
        self._ends.clear()
        self._thread = threading.Thread(target=self._pulse, args=(draw.random(),), daemon=True)
        self._thread.start()

    def speed_up(self) -> None:
        """End `slow_down`."""
        self._ends.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _pulse(self, seed: float) -> None:
        draw = random.Random(seed)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            while not self._ends.is_set():
                fcntl.ioctl(handle, FIFREEZE, 0)
                try:
                    self._ends.wait(draw.uniform(*FROZEN_SECONDS))
                finally:
                    fcntl.ioctl(handle, FITHAW, 0)
                self._ends.wait(draw.uniform(*THAWED_SECONDS))
        finally:
            os.close(handle)


@contextlib.contextmanager
def mounted(folder: Path, image: Path, *, megabytes: int) -> Iterator[Storage]:
    """Create an ext4 file system in the file `image` and mount it at `folder`; unmount and remove both afterwards."""
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    # No blocks that are reserved for root, who runs the ranks.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(folder)], check=True, timeout=60)
    storage = Storage(folder)
    try:
        yield storage
    finally:
        storage.speed_up()
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)
        image.unlink()
        folder.rmdir()
