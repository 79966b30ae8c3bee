"""Start the processes of a command on this machine: `pipeline train --processes 8 -- --variant b3 --data SET`.

`launch.start.hosts` calls this file on each of several machines.

This uses the part of torchrun that starts and ends processes, without its agent: the machines are known and nothing is
restarted, so there is nothing to agree on, and the agent's errors are tracebacks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from shards.errors import UserError, first_line
from shards.option_help import default
from shards.redact import printable

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ProcessCount = Annotated[
    Annotated[int, Interval(ge=1, le=1024)] | None, default("one per GPU, 1 on a machine without GPUs")
]
"""Option for the number of training processes on this machine."""
TRAIN = Path(__file__).parents[1] / "train.py"
POLL_SECONDS = 0.1
# Seconds for the processes to save after a signal, as in launch/slurm/train.sbatch; torchrun's default is 30.
SAVE_SECONDS = 170
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


def start_training(processes: int | None, options: Sequence[str]) -> int:
    """Train with `processes` processes (None: one per GPU); return the exit status of launch/train.py.

    Signals are passed on to all processes, and this process waits until they have ended. A single process replaces this
    one.
    """
    count = processes or default_processes()
    if count == 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, str(TRAIN), *options])
    return run_training(count, options)


def default_processes() -> int:
    """Return the number of GPUs, or 1 if there are none."""
    return max(1, _gpus())


def _gpus() -> int:
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):
        return 0  # without a driver there is nothing to count, for which importing torch would take seconds
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Node:
    """This machine's place among the machines of a training."""

    number: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Address of machine 0."""
    port: int = 0
    """Port of machine 0 at which the ranks find each other; 0, for one machine only: chosen by the system."""


def run_training(count: int, options: Sequence[str], node: Node | None = None) -> int:
    """Train with `count` processes, which end before this function returns the exit status of launch/train.py.

    Args:
        count: processes on this machine.
        node: this machine, if there are several, with `count` processes each.
    """
    return run_processes(TRAIN, count, options, name="train", node=node)


def run_processes(
    script: Path, count: int, options: Sequence[str], *, name: str, node: Node | None = None
) -> int:
    """Run a script in `count` processes, the ranks of a job; return the exit status of the first that failed, or 0.

    Args:
        count: processes on this machine.
        name: name of the job, for temporary files.
        node: this machine, if there are several, with `count` processes each.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    node = node or Node()
    # This process holds the store through which the ranks find each other, on one machine at a port that the system has
    # chosen. If rank 0 held it, as without a launcher, another program could take the port in the meantime.
    port = node.port
    if node.number == 0:
        store = _store(TCPStore, node)  # closed with its last reference
        port = store.port
    common = {
        "WORLD_SIZE": str(node.count * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": node.address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": f"pipeline-{name}-{os.getpid()}",
        "OMP_NUM_THREADS": "1",  # until each rank has divided the cores
    }
    first = node.number * count
    envs = {rank: common | {"RANK": str(first + rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    arguments = {rank: (str(script), *options) for rank in range(count)}
    handled = [number.name for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(handled)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(
        logging.CRITICAL
    )  # `_exit_status` says it
    with _signals_for_the_processes(), tempfile.TemporaryDirectory(prefix=f"pipeline-{name}-") as folder:
        running: Any = start_processes(name, sys.executable, arguments, envs, DefaultLogsSpecs(log_dir=folder))
        signal.signal(signal.SIGUSR1, lambda number, frame: _forward(running, number, frame))
        request: SignalException | None = None
        failed: list[ProcessFailure] = []
        while True:
            try:
                if request is None:
                    failed = list(running.wait(period=POLL_SECONDS).failures.values())  # in the order of their ends
                else:
                    running.close(request.sigval, timeout=SAVE_SECONDS)
                    failed = _failures(running)
                break
            except SignalException as new:  # pass it on, also a second one
                request = new
        if request is not None:  # a process that had not begun to train was ended by the signal itself
            failed = [failure for failure in failed if failure.exitcode != -request.sigval] or failed
            if failed and failed[0].exitcode == -request.sigval:
                return 128 + request.sigval
        return _exit_status(failed[0], first) if failed else 0


def _store(kind: type[TCPStore], node: Node) -> TCPStore:
    """Open the store of a training, on machine 0.

    Raises:
        UserError: the port is in use.
    """
    try:
        return kind("127.0.0.1", node.port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:  # torch has no class of its own for it
        raise UserError(f"--port {node.port}: cannot be used ({first_line(error)}); choose another port") from None


@contextlib.contextmanager
def _signals_for_the_processes() -> Iterator[None]:
    """Restore the handlers of signals that `start_processes` and this file replace."""
    old = {number: signal.getsignal(number) for number in (*FORWARDED, signal.SIGUSR1)}
    pipe = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe)


def _forward(running: Any, number: int, frame: FrameType | None) -> None:
    for pid in running.pids().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _failures(running: Any) -> list[ProcessFailure]:
    """Return the processes that have not returned 0, ordered by rank."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    return [
        ProcessFailure(rank, handler.proc.pid, handler.proc.returncode, running.error_files[rank])
        for rank, handler in running.subprocess_handlers.items()
        if handler.proc.returncode
    ]


def _exit_status(failure: ProcessFailure, first: int) -> int:
    """Print the error of the process that failed first, unless it has done so itself; return the exit status.

    Args:
        first: rank of the first process on this machine.
    """
    message, line = failure.message, ""
    if isinstance(message, dict):
        line = message["message"]
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        cause = " (out of memory?)" if name == "SIGKILL" else ""
        host = os.uname().nodename
        rank = first + failure.local_rank
        line = f"error: rank {rank} on {host} was killed by {name}{cause}; run the same command to resume"
    if line:
        print(printable(line), file=sys.stderr, flush=True)
    return max(failure.exitcode, 1)
