"""Where the other ranks stand, asked of each directly: when a collective hangs, nothing that needs one can tell.

Every rank listens on a socket of its own and answers, from a thread, with the step it is at and for how long; asked for
its stacks, it writes them first. Requests carry a secret that the ranks have agreed on.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from launch.network import host_name, own_address
from launch.world import World

ANSWER_SECONDS = 5.0
AT_ONCE = 64  # connections
REQUEST_BYTES = 128
SHOWN = 16


@dataclass(frozen=True)
class Peer:
    """A rank, as it introduced itself."""

    rank: int
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


@dataclass(frozen=True)
class Standing:
    """A peer and, if it answered, the steps that are behind it and the seconds since its last sign of progress."""

    peer: Peer
    step: int | None = None
    seconds: float = 0.0

    @property
    def silent(self) -> bool:
        return self.step is None


class Peers:
    """Answers for this rank, and asks the others. Made by all ranks together (collective).

    Args:
        standing: this rank's (steps done, seconds since); called in a thread.
        dump: writes this rank's stacks; called in a thread.
    """

    def __init__(self, world: World, standing: Callable[[], tuple[int, float]], dump: Callable[[], None]) -> None:
        self._standing, self._dump = standing, dump
        self._listener: socket.socket | None = None
        self.others: list[Peer] = []
        if world.size == 1:
            return
        address = own_address()
        self._listener = socket.create_server((address, 0), backlog=AT_ONCE * 2)
        own = Peer(world.rank, host_name(), address, self._listener.getsockname()[1])
        introductions: list[tuple[Peer, str]] = [(own, "")] * world.size
        dist.all_gather_object(introductions, (own, secrets.token_hex(16)))
        self._secret = introductions[0][1]
        self.others = [peer for peer, _ in introductions if peer.rank != world.rank]
        threading.Thread(target=self._answer, name="peers", daemon=True).start()

    def close(self) -> None:
        """Stop answering. Idempotent."""
        if self._listener is not None:
            self._listener.close()

    def ask(self, *, stacks: bool) -> list[Standing]:
        """Every other rank's standing; takes at most a few seconds.

        Args:
            stacks: have them write their stacks too.
        """
        if not self.others:
            return []
        with ThreadPoolExecutor(min(AT_ONCE, len(self.others)), thread_name_prefix="ask-peer") as pool:
            return list(pool.map(lambda peer: self._ask(peer, stacks), self.others))

    def _ask(self, peer: Peer, stacks: bool) -> Standing:
        try:
            with socket.create_connection((peer.address, peer.port), timeout=ANSWER_SECONDS) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(f"{self._secret} {'stacks' if stacks else 'standing'}\n".encode())
                step, seconds = json.loads(connection.makefile().readline())
                return Standing(peer, int(step), float(seconds))
        except (OSError, ValueError, TypeError):
            return Standing(peer)

    def _answer(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # out of descriptors, say
                continue
            with connection:
                try:
                    connection.settimeout(ANSWER_SECONDS)
                    secret, _, wish = connection.makefile().readline(REQUEST_BYTES).strip().partition(" ")
                    if not secrets.compare_digest(secret, self._secret):
                        continue
                    if wish == "stacks":
                        self._dump()
                    connection.sendall((json.dumps(self._standing()) + "\n").encode())
                except (OSError, ValueError):  # the asker has gone, or it was a port scanner
                    continue


def explain(standings: list[Standing], step: int) -> str:
    """For people: who does not answer, who is behind, who is ahead."""
    if not standings:
        return "there are no other ranks to wait for: data, file system or device hang"
    silent = [str(s.peer) for s in standings if s.silent]
    behind = [f"{s.peer}, at step {s.step} for {s.seconds:.0f} s" for s in standings if not s.silent and s.step < step]  # type: ignore[operator]
    ahead = [f"{s.peer}, at step {s.step}" for s in standings if not s.silent and s.step > step]  # type: ignore[operator]
    parts = [
        f"{label}: {'; '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for label, names in (("no answer from", silent), ("behind", behind), ("ahead", ahead))
        if names
    ]
    return "; ".join(parts) or f"all other ranks answer and are at step {step} too: a collective or a file system hangs"
