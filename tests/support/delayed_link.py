"""Delay Ethernet frames between two new TAP interfaces: `python -m tests.support.delayed_link TAP1 TAP2 SECONDS`.

The kernel's own delay (the qdisc netem) is not part of every kernel. Large TCP segments are forwarded in one piece,
with the header that describes them, because splitting them would take more CPU time than the tested program.
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

# From linux/if_tun.h: set the interface of a file descriptor; Ethernet frames, without a header of the driver, but with
# one for segments that are larger than a frame and for checksums that are not yet computed.
TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
TUNSETOFFLOAD, TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x400454D0, 0x01, 0x02, 0x04
MAX_FRAME = 1 << 17
MAX_BURST = 32  # frames that are read before others are forwarded


def open_tap(name: str) -> int:
    """Create a TAP interface; return the descriptor from which its outgoing frames are read."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    return tap


def forward(first: int, second: int, delay: float) -> None:
    """Forward frames in both directions, each `delay` seconds after it arrived, until the process is ended."""
    other = {first: second, second: first}
    frames: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait = max(frames[0][0] - time.monotonic(), 0) if frames else None
        for tap in select.select([first, second], [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError, OSError):  # OSError: the interface is not up yet
                for _ in range(MAX_BURST):
                    frames.append((time.monotonic() + delay, other[tap], os.read(tap, MAX_FRAME)))
        while frames and frames[0][0] <= time.monotonic():
            _, tap, frame = frames.popleft()
            with contextlib.suppress(OSError):
                os.write(tap, frame)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # without the right to it, other programs may add to the delay
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    taps = [open_tap(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    forward(taps[0], taps[1], float(sys.argv[3]))
