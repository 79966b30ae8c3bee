"""Training on several hosts without SLURM: torchrun or `accelerate launch` on each, and `pipeline train --hosts`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.conftest import OPTIONS, RECORDED, Job, need, uninterrupted
from tests.support.hosts import Host, some_hosts
from tests.support.launching import LAUNCHER, ROOT, environment, free_port, lines
from tests.support.runs import process_of_rank, status

SSHD = """\
Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
"""
SSH = """\
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
STEPS = 6
SMALL = ("--classes-subset", "2")  # a short evaluation


@dataclass
class SshHosts:
    """Hosts with an SSH server each. Commands are run on the first, as on a login node."""

    hosts: list[Host]
    folder: Path

    def start(self, *options: str | Path, hosts: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start `pipeline train --hosts ...` for two hosts with one process each."""
        names = hosts or [f"host{number}" for number in range(len(self.hosts))]
        ssh = f"ssh -F {self.folder / 'config'}"
        job = ("--hosts", *names, "--ssh", ssh, "--processes", "1", "--port", str(free_port()))
        env = environment(self.folder, OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "launch.cli", "train", *job, "--", *OPTIONS, *SMALL, *options]
        return self.hosts[0].start(command, cwd=ROOT, env=env, log=self.folder / "log")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def trainings(self, run: Path) -> list[int]:
        """Return the processes on all hosts whose command line has the path of the run."""
        found = []
        for pid in [pid for host in self.hosts for pid in host.processes()]:
            with contextlib.suppress(OSError):
                found += [pid] if str(run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else []
        return found


def one_core(host: int) -> tuple[str, ...]:
    """Return the beginning of a command on a core of its own.

    On this machine the OpenMP threads of two hosts would otherwise compete for the cores, and spin while they wait.
    """
    return ("taskset", "-c", str(host % (os.cpu_count() or 1)))


@pytest.fixture
def ssh_hosts(tmp_path: Path) -> Iterator[SshHosts]:
    need("ip", "ssh", "ssh-keygen")
    server = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")
    if server is None:
        need("sshd")
    folder = tmp_path / "ssh"
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires it
    with some_hosts() as hosts:
        client = SSH.format(folder=folder)
        for number, host in enumerate(hosts):
            command = [*one_core(number), str(server), "-D", "-e", "-f", folder / "sshd_config"]
            host.start(command, cwd=ROOT, env=environment(folder), log=folder / f"sshd-{number}.log")
            client += f"Host host{number}\n  HostName {host.address}\n"
        (folder / "config").write_text(client)
        listening = ["ip", "netns", "exec", hosts[0].name, "bash", "-c"]
        for host in hosts:
            probe = [*listening, f": </dev/tcp/{host.address}/22"]
            wait_until(
                lambda probe=probe: not subprocess.run(probe, check=False, capture_output=True).returncode, "sshd"
            )  # type: ignore[misc]
        yield SshHosts(hosts, folder)


def wait_for_steps(run: Path, steps: int, hosts: SshHosts, process: subprocess.Popen[str]) -> None:
    def reached() -> bool:
        path = run / "metrics.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return any(line["kind"] == "train" and line["step"] >= steps for line in lines)

    wait_until(lambda: reached() or process.poll() is not None, f"step {steps}", seconds=200)
    assert reached(), hosts.log


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_on_each_host_trains_with_the_batches_of_one_process(
    launcher: str, tmp_path: Path, digits: Path
) -> None:
    need("ip")
    run, port = tmp_path / "run", str(free_port())
    options = (*OPTIONS, "--data", digits, "--out", run, "--stop-after", str(STEPS))
    with some_hosts() as hosts:
        for number, host in enumerate(hosts):
            command = {
                "torchrun": (
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)),
                    *("--nproc-per-node", "1", "--master-addr", hosts[0].address, "--master-port", port),
                ),
                "accelerate": (
                    *(*LAUNCHER, "--multi_gpu", "--num_machines", "2", "--num_processes", "2"),
                    *("--machine_rank", str(number), "--main_process_ip", hosts[0].address),
                    *("--main_process_port", port, "--rdzv_backend", "static"),
                ),
            }[launcher]
            host.start(
                [*one_core(number), *command, RECORDED, *options],
                cwd=ROOT,
                env=environment(tmp_path),
                log=tmp_path / f"{number}",
            )
        for number, host in enumerate(hosts):
            assert host.started[0].wait(200) == 0, (tmp_path / f"{number}").read_text()
    assert status(run)["status"] == "finished"
    assert Job(None, 0, run).batches() == uninterrupted(digits, STEPS)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_restarts_on_all_hosts_from_the_last_checkpoint(tmp_path: Path, digits: Path) -> None:
    """Also with --resume never, although the agent of rank 0 counts no failure."""
    need("ip")
    run, port = tmp_path / "run", str(free_port())
    options = (*OPTIONS, *SMALL, "--data", digits, "--out", run, "--resume", "never", "--save-every", "4")
    with some_hosts() as hosts:
        agent = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{port}", "--max-restarts", "3"),
        )
        for number, host in enumerate(hosts):
            # is_host: this machine's name does not resolve to the address of a simulated host.
            conf = ("--rdzv-conf", f"is_host={number == 0}", "--local-addr", host.address)
            command = [*one_core(number), *agent, *conf, RECORDED, *options]
            env = environment(tmp_path, PACE="0.2")
            host.start([*command, "--stop-after", "16"], cwd=ROOT, env=env, log=tmp_path / str(number))
        wait_until(lambda: list(run.glob("checkpoints/step-*")), "a checkpoint", seconds=200)
        os.kill(process_of_rank(run, 1), signal.SIGKILL)
        for number, host in enumerate(hosts):
            assert host.started[0].wait(200) == 0, (tmp_path / str(number)).read_text()
    assert status(run)["status"] == "finished"
    assert [line["step"] > 0 for line in lines(run, "start")] == [False, True]


@pytest.mark.timeout(400)
def test_ctrl_c_saves_on_all_hosts_and_the_same_command_resumes(
    ssh_hosts: SshHosts, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    process = ssh_hosts.start("--data", digits, "--out", run)
    wait_for_steps(run, 2, ssh_hosts, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 75, ssh_hosts.log
    assert status(run)["status"] == "preempted"
    saved = status(run)["step"]
    assert ssh_hosts.trainings(run) == []
    assert ssh_hosts.start("--data", digits, "--out", run, "--stop-after", str(saved + 2)).wait(200) == 0, ssh_hosts.log
    starts = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "start"
    ]
    assert [(line["step"], line["world"]) for line in starts] == [(0, 2), (saved, 2)]
    assert status(run)["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_hosts_save_and_stop_if_the_command_is_killed(ssh_hosts: SshHosts, tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    process = ssh_hosts.start("--data", digits, "--out", run)
    wait_for_steps(run, 2, ssh_hosts, process)
    process.kill()
    wait_until(lambda: not ssh_hosts.trainings(run), "end of the trainings", seconds=200)
    assert status(run)["status"] == "preempted"


@pytest.mark.timeout(300)
def test_errors_name_the_host_and_leave_no_process(ssh_hosts: SshHosts, tmp_path: Path, digits: Path) -> None:
    run, missing = tmp_path / "run", tmp_path / "missing"
    assert ssh_hosts.start("--data", digits, "--out", run, hosts=("host0", "10.77.255.1")).wait(100) == 2
    assert "error: --hosts 10.77.255.1: ssh: connect to host 10.77.255.1" in ssh_hosts.log

    assert ssh_hosts.start("--data", missing, "--out", run).wait(200) == 2
    # Rank 1 prints it too, as its own error, if the connections are so slow that it is not ended within some seconds.
    message = f"error: {missing}: no such shard set; create it with 'pipeline shard SOURCE --out {missing}'"
    printed = ssh_hosts.log.splitlines()
    assert printed.count(message) == 1
    assert printed[-1] in (message, f"rank 1: {message}")

    process = ssh_hosts.start("--data", digits, "--out", run)
    wait_for_steps(run, 2, ssh_hosts, process)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    assert process.wait(200) == 1
    assert f"error: rank 1 on {os.uname().nodename} was killed by SIGKILL" in ssh_hosts.log
    assert ssh_hosts.trainings(run) == []
