"""Run commands on other machines with ssh."""

from __future__ import annotations

import ipaddress
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError

HOST = re.compile(r"([\w.-]+@)?\w[\w.:-]*", re.ASCII)
"""A host as ssh accepts it. It cannot begin with a hyphen, which ssh would take for an option."""
# No questions, since nobody can answer for several hosts, and a limit after which an unreachable host is an error. No
# terminal, because its input does not end with the connection.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"),
    *("-o", "RequestTTY=no"),
)
SSH_FAILED = 255  # exit status of ssh itself

# Run on each host: $1 is the folder, then follows the command. `read` fails when the connection ends.
SCRIPT = """
cd "$1" || exit 2
shift
exec 3<&0
"$@" </dev/null &
pid=$!
{ while read -r _; do :; done; kill -TERM "$pid"; } <&3 >/dev/null 2>&1 &
watcher=$!
wait "$pid"
status=$?
kill "$watcher" 2>/dev/null
exit "$status"
"""
QUERY = 'cd "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Hosts:
    """Machines that can be reached with ssh."""

    names: tuple[str, ...]
    ssh: tuple[str, ...]
    """Command that runs a command on a host, with its options."""

    def __post_init__(self) -> None:
        for name in self.names:
            if not HOST.fullmatch(name):
                raise UserError(f"--hosts {name}: expected the name or address of a host, such as node1 or user@node1")
        if len(set(self.names)) < len(self.names):
            raise UserError(f"--hosts {' '.join(self.names)}: a host occurs twice; use --processes for several ranks")
        if not self.ssh:
            raise UserError("--ssh: expected a command, such as 'ssh -p 2222'")

    def address(self) -> str:
        """Return the address of the first host, for which ssh's configuration may have another name.

        Raises:
            UserError: ssh cannot be started, or the other hosts cannot connect to the address.
        """
        try:
            found = subprocess.run(
                [*self.ssh, "-G", self.names[0]], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise UserError(f"--ssh {shlex.join(self.ssh)}: cannot be started ({error.strerror})") from None
        lines = dict(line.split(" ", 1) for line in found.stdout.splitlines() if " " in line)
        address = lines.get("hostname", self.names[0].rpartition("@")[2])
        if len(self.names) > 1 and _is_loopback(address):
            raise UserError(
                f"--hosts {' '.join(self.names)}: the other hosts cannot connect to the first one at {address}; use "
                "its name or address in the network that the hosts have in common"
            )
        return address

    def start(self, number: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command in the current folder of a host; it gets SIGTERM when the standard input is closed."""
        return self._start(number, SCRIPT, command, environment, stdin=subprocess.PIPE)

    def start_query(
        self, number: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output is read, in the current folder of a host."""
        pipe = subprocess.PIPE
        return self._start(number, QUERY, command, environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)

    def _start(
        self, number: int, script: str, command: Sequence[str], environment: Mapping[str, str], **streams: Any
    ) -> subprocess.Popen[bytes]:
        variables = [f"{name}={value}" for name, value in environment.items()]
        remote = shlex.join(["bash", "-c", script, "bash", str(Path.cwd()), "env", *variables, *command])
        # A session of its own, so that Ctrl-C at a terminal does not end the connection.
        return subprocess.Popen(
            [*self.ssh, *SSH_OPTIONS, self.names[number], remote], start_new_session=True, **streams
        )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"
