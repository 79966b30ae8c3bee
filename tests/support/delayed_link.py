"""Delay Ethernet frames between two new TAP interfaces: `python -m tests.support.delayed_link TAP1 TAP2 SECONDS`.

The kernel's own delay (the qdisc netem) is not part of every kernel. The kernel completes the checksums of frames that
it gives to a TAP interface, and splits large TCP segments, so that frames can be forwarded as they are.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

# From linux/if_tun.h: set the interface of a file descriptor; Ethernet frames, without a header of the driver.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MAX_FRAME = 1 << 16


def open_tap(name: str) -> int:
    """Create a TAP interface; return the descriptor from which its outgoing frames are read."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def forward(first: int, second: int, delay: float) -> None:
    """Forward frames in both directions, each `delay` seconds after it arrived, until the process is ended."""
    other = {first: second, second: first}
    frames: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait = max(frames[0][0] - time.monotonic(), 0) if frames else None
        for tap in select.select([first, second], [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError, OSError):  # OSError: the interface is not up yet
                frames.append((time.monotonic() + delay, other[tap], os.read(tap, MAX_FRAME)))
        while frames and frames[0][0] <= time.monotonic():
            _, tap, frame = frames.popleft()
            with contextlib.suppress(OSError):
                os.write(tap, frame)


if __name__ == "__main__":
    taps = [open_tap(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    forward(taps[0], taps[1], float(sys.argv[3]))
