"""A SLURM cluster on this machine: munged, slurmctld and several slurmds, with a separate folder and separate ports."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import socket
import subprocess
from pathlib import Path

from tests.support import waiting
from tests.support.launching import environment, free_port

# A longer interval than usual, because each check starts a SLURM command.
wait_until = functools.partial(waiting.wait_until, interval=0.2)

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A requeued job waits until its credentials expire: 120 s by default; SLURM accepts at least 5.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Nodes n0, n1, ..., each bound to one core of this machine, so that every rank has one core."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname()
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 RealMemory=4000"
            for name in self.nodes
        ]
        (folder / "state").mkdir()
        (folder / "munge").mkdir(mode=0o700)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.config = folder / "slurm.conf"
        self.config.write_text(
            CONFIG.format(host=host, port=free_port(), folder=folder, nodes="\n".join(lines)), encoding="utf-8"
        )

    def __enter__(self) -> Cluster:
        munge = self.folder / "munge"
        paths = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", "--num-threads=2", f"--socket={munge / 'socket'}", *paths)
        wait_until((munge / "socket").exists, "munged's socket")
        self._start("slurmctld", "-D")
        wait_until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "slurmctld")
        for name in self.nodes:
            self.start_node(name)
        wait_until(lambda: self.idle() == set(self.nodes), "idle nodes")
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root", check=False)
        with contextlib.suppress(AssertionError):
            self.wait_for_silence()
        for name in ("slurmctld", *self.nodes, "munged"):
            if name in self._daemons:
                self._daemons[name].terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        cores = sorted(os.sched_getaffinity(0))
        core = cores[self.nodes.index(name) % len(cores)]
        self._start("taskset", "--cpu-list", str(core), "slurmd", "-D", "-N", name, as_name=name)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and everything that runs on it. All are stopped first, so that none reports a death."""
        jobs = self.processes(node=name)
        step_daemons = {parent for parent in map(parent_of, jobs) if command_of(parent).startswith(b"slurmstepd")}
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (self._daemons[name].pid, *step_daemons, *jobs):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self._daemons.pop(name).wait()

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command."""
        return subprocess.run(
            [str(part) for part in command],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    def environment(self) -> dict[str, str]:
        """Return the environment for SLURM's commands and jobs."""
        return environment(self.folder) | {"SLURM_CONF": str(self.config)}

    def idle(self) -> set[str]:
        """Return the idle nodes."""
        out = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout
        return {line.split()[0] for line in out.splitlines() if line.split()[1] == "idle"}

    def job(self, number: int) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary."""
        out = self.run("scontrol", "show", "job", str(number)).stdout
        return dict(part.split("=", maxsplit=1) for part in out.split() if "=" in part)

    def wait_for_end(self, number: int, seconds: float = 240) -> dict[str, str]:
        """Wait for the job to end (a requeue is not an end), and return its properties."""
        wait_until(lambda: self.job(number)["JobState"] in ENDED, f"the end of job {number}", seconds)
        return self.job(number)

    def wait_for_silence(self, seconds: float = 45) -> None:
        """Wait until all processes of jobs have ended.

        Raises:
            AssertionError: some processes remain; the message lists them.
        """
        try:
            wait_until(lambda: not self.processes(), "end of the jobs' processes", seconds)
        except AssertionError as error:
            names = [f"{pid} {command_of(pid).replace(bytes(1), b' ').decode()}" for pid in self.processes()]
            raise AssertionError(f"{error}: {names}") from None

    def processes(self, node: str | None = None) -> list[int]:
        """Return processes of jobs (on `node`) and the daemons of their steps, without the daemons of the nodes."""
        own = {daemon.pid for daemon in self._daemons.values()} | {os.getpid()}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            command = command_of(int(entry.name))
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = f"SLURM_CONF={self.config}".encode() in variables
            steps = command.startswith(b"slurmstepd") and str(self.folder).encode() in b"".join(variables)
            if not command or not (ours or steps) or command.startswith(NOT_JOBS):
                continue
            if node is None or f"SLURMD_NODENAME={node}".encode() in variables:
                found.append(int(entry.name))
        return found

    def _start(self, *command: str, as_name: str | None = None) -> None:
        name = as_name or command[0]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(command, env=self.environment(), stdout=log, stderr=log)


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
NOT_JOBS = (b"scontrol", b"squeue", b"sinfo", b"sbatch", b"scancel", b": slurmscriptd", b"slurmscriptd")


def command_of(pid: int) -> bytes:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
