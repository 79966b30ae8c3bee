"""A file system that hangs, like a network mount without its server: a FUSE mount that never answers."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

# From linux/fuse.h: fuse_in_header, fuse_out_header, and the answer to INIT of protocol 7.31.
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
INIT_ANSWER = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 0, 0, 0, *[0] * 7)
REQUEST_BYTES = 1 << 17


def can_mount() -> bool:
    """Return whether this process can mount FUSE file systems."""
    return os.getuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


def mount_hanging(folder: Path) -> None:
    """Mount a hanging file system at `folder`: every access to it blocks until this process ends.

    The process must be in its own mount namespace (`unshare --mount`), which removes the mount when it ends.
    """
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"hanging", os.fsencode(folder), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(folder))
    _, _, unique, *_ = IN_HEADER.unpack_from(os.read(server, REQUEST_BYTES))
    os.write(server, OUT_HEADER.pack(OUT_HEADER.size + len(INIT_ANSWER), 0, unique) + INIT_ANSWER)
