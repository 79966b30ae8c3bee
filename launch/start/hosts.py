"""Start a training on several machines with ssh: `pipeline train --hosts node1 node2 -- --variant b3 --data SET`.

This file is run again on each host, and starts the processes there. If a connection ends, for example because this
command was killed, its host's training saves and stops: a shell on the host waits for the end of its standard input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from launch.config.command_line import parse
from launch.run.status import EXIT_STATUS
from launch.start.processes import Node, run_training
from launch.start.ssh import SSH_FAILED, Hosts
from shards.errors import UserError, report
from shards.redact import printable

PASSED_VARIABLES = ("FAT_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "PYTHONPATH")
"""Beginnings of the names of environment variables that the hosts get: ssh passes none by itself."""
# Seconds in which the other hosts' trainings can end by themselves after one has failed. They name the rank at fault.
GRACE_SECONDS = 60.0
ANSWER_SECONDS = 300.0  # in which a host counts its GPUs; importing torch from busy storage may take a minute
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1


def train_on_hosts(hosts: Hosts, processes: int | None, port: int, options: Sequence[str]) -> int:
    """Train with `processes` processes on each host (None: one per GPU); return the exit status of the training.

    All hosts must have this project, its Python and the run folder at the same paths. SIGINT, SIGTERM and SIGHUP save
    and stop; after a second one, this function does not wait for the hosts.

    Args:
        port: port of the first host at which the processes find each other.
        options: options of launch/train.py.

    Raises:
        UserError: an option is invalid, or a host cannot be used.
    """
    parse(options, prog="pipeline train --")  # an error of it, or the help, is printed once
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_VARIABLES)}
    address, nodes = hosts.address(), len(hosts.names)
    count = _processes(hosts, environment, processes)
    start = [sys.executable, "-m", "launch.start.hosts"]
    connections = [
        hosts.start(number, [*start, *map(str, (number, nodes, address, port, count)), *options], environment)
        for number in range(nodes)
    ]
    with _stop_on_signals(connections):
        failed = _wait(connections)
    if failed is None:
        return 0
    host, status = hosts.names[failed], connections[failed].returncode
    if status in (EXIT_STATUS, UserError.exit_code):
        return status
    reason = "the connection failed" if status == SSH_FAILED else f"the training returned {status}"
    print(f"error: {printable(host)}: {reason}; run the same command to resume", file=sys.stderr, flush=True)
    return 1


def _processes(hosts: Hosts, environment: Mapping[str, str], given: int | None) -> int:
    """Return the number of processes per host: `given`, or the number of GPUs.

    Raises:
        UserError: a host cannot be reached, does not have this project, or has another number of GPUs.
    """
    command = [sys.executable, "-c", "from launch.start.processes import default_processes; print(default_processes())"]
    connections = [hosts.start_query(n, command, environment) for n in range(len(hosts.names))]
    try:
        found = {name: _answer(name, connection) for name, connection in zip(hosts.names, connections, strict=True)}
    finally:
        for connection in connections:
            connection.kill()  # no effect on one that has ended
    if given is None and len(set(found.values())) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in found.items())
        raise UserError(f"--hosts: the hosts have different numbers of GPUs ({counts}); set --processes")
    return given or found[hosts.names[0]]


def _answer(name: str, connection: subprocess.Popen[bytes]) -> int:
    """Return the number that a host has printed in its last line, which may follow output of its shell's start files.

    Raises:
        UserError: the host cannot be reached, or does not have this project.
    """
    try:
        streams = connection.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--hosts {name}: no answer within {ANSWER_SECONDS:g} seconds; log in to the host, and check that its "
            "storage responds"
        ) from None
    lines, reasons = (
        [line.strip() for line in stream.decode(errors="replace").splitlines() if line.strip()] for stream in streams
    )
    if connection.returncode or not lines or not lines[-1].isdecimal():
        reason = (reasons or [f"unexpected output {lines[-1]!r}" if lines else "no output"])[-1]
        raise UserError(
            f"--hosts {name}: {reason}; each host must accept ssh without a password, and have this project and "
            f"{sys.executable} at the same paths"
        )
    return int(lines[-1])


@contextlib.contextmanager
def _stop_on_signals(connections: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Let the hosts' trainings save and stop on the first signal, and raise KeyboardInterrupt on the second.

    Signals stay ignored if they are, as under nohup.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            print("no longer waiting: the hosts save and stop by themselves", file=sys.stderr, flush=True)
            raise KeyboardInterrupt
        for connection in connections:
            _close(connection)

    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, stop) for number in numbers}
    pipe = signal.set_wakeup_fd(-1)  # a thread of `pipeline` would print that the command is interrupted
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in old.items():
            signal.signal(number, handler)
        for connection in connections:
            _close(connection)


def _close(connection: subprocess.Popen[bytes]) -> None:
    """Ask one host's training to save and stop."""
    assert connection.stdin is not None
    with contextlib.suppress(OSError):
        connection.stdin.close()


def _wait(connections: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all hosts; return the number of the one that failed first, None if all succeeded."""
    failed: int | None = None
    end = float("inf")
    while True:
        running = [connection for connection in connections if connection.poll() is None]
        if failed is None:
            failed = next((n for n, connection in enumerate(connections) if connection.returncode), None)
            if failed is not None:
                crashed = connections[failed].returncode not in (EXIT_STATUS, UserError.exit_code, SSH_FAILED)
                end = time.monotonic() + (GRACE_SECONDS if crashed else 0)
        if not running:
            return failed
        if time.monotonic() > end:
            for connection in running:
                _close(connection)
        time.sleep(POLL_SECONDS)


def main(args: Sequence[str]) -> int:
    """Start the processes of one host; return the exit status of the training."""
    number, nodes, address, port, count, *options = args
    try:
        return run_training(int(count), options, Node(int(number), int(nodes), address, int(port)))
    except UserError as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
