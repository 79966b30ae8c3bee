"""`pipeline doctor` names the slow and misconfigured ones of several simulated hosts."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import need
from tests.support.cpu_quota import cpu_quota, joined
from tests.support.hosts import Host, ThisMachine, some_hosts
from tests.support.launching import ROOT, environment, free_port, python_path
from tests.support.waiting import wait_until

DOCTOR = (sys.executable, "-m", "launch.cli", "doctor")
DELAY_SECONDS = 0.01
RATE = "100mbit"


@dataclass(frozen=True)
class Start:
    """How the command is started on one host: words before it, and environment variables."""

    before: Sequence[str | Path] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    statuses: list[int]
    text: str
    """What the first host printed."""
    content: dict[str, Any]
    """The JSON file."""

    def named(self) -> dict[str, set[str]]:
        """Return the hosts of each kind of finding."""
        found: dict[str, set[str]] = {}
        for finding in self.content["findings"]:
            found.setdefault(finding["kind"], set()).update(finding["hosts"])
        return found


def doctor(
    hosts: Sequence[Host | ThisMachine], folder: Path, *args: str | Path, starts: Mapping[int, Start] | None = None
) -> Result:
    """Run `pipeline doctor ARGS` as one rank on each host."""
    output, port, logs = folder / "doctor.json", str(free_port()), []
    processes = []
    for number, host in enumerate(hosts):
        start = (starts or {}).get(number, Start())
        ranks = {"RANK": str(number), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        interface = "lo" if isinstance(host, ThisMachine) else "eth0"
        network = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": interface}
        env = environment(folder, **ranks, **network, **{"SLURMD_NODENAME": f"host{number}"} | dict(start.env))
        logs.append(folder / f"doctor-{number}.log")
        command = [*start.before, *DOCTOR, *args, "--json", output]
        processes.append(host.start(command, cwd=ROOT, env=env, log=logs[-1]))
    try:
        statuses = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [log.read_text() for log in logs]
    assert output.exists(), "\n".join(texts)
    return Result(statuses, texts[0], json.loads(output.read_text()))


def other_version(folder: Path) -> Start:
    """Return the start of a host on which another version of NumPy is installed, by its metadata."""
    metadata = folder / "site" / "numpy-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    return Start(env={"PYTHONPATH": f"{metadata.parents[1]}:{python_path()}"})


@pytest.mark.timeout(400)
def test_hosts_with_a_cpu_quota_few_open_files_and_another_version_are_named(tmp_path: Path) -> None:
    few_files = ("sh", "-c", 'ulimit -n 1000 && exec "$@"', "limited")
    with cpu_quota(0.5) as quota:
        faults = {1: Start(before=joined(quota)), 2: Start(few_files, other_version(tmp_path).env)}
        result = doctor([ThisMachine()] * 3, tmp_path, starts=faults)
    assert set(result.statuses) == {1}, result.text
    named = result.named()
    # One core may copy and send more slowly than several.
    assert named.pop("copy", {"host1"}) == named.pop("bandwidth", {"host1"}) == {"host1"}
    named.pop("cpu-quota", None)  # on a busy machine, the process may not use up its quota
    assert named == {
        "cores": {"host1"},
        "matmul": {"host1"},
        "open-files": {"host2"},
        "versions": {"host2"},
    }, result.text
    words = " ".join(result.text.split())
    for text in ("host1: 1 of", "usable (CPU quota)", "; it has 1 CPU core (CPU quota)", "numpy 0.0.1",
                 "the limit of open files is 1,000 (hard limit 1,000)"):  # fmt: skip
        assert text in words, result.text
    assert "--exclude" not in result.text  # two of three hosts are not a minority
    offsets = [node["clock_offset"] for node in result.content["nodes"]]
    assert max(map(abs, offsets)) < 1  # it is the same clock


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["delayed", pytest.param("rate-limited", marks=pytest.mark.slow)])
def test_a_slow_link_is_named_and_its_host_excluded(tmp_path: Path, fault: str) -> None:
    need("ip", "tc")
    with some_hosts(3) as hosts, contextlib.ExitStack() as stack:
        if fault == "delayed":
            stack.enter_context(hosts[2].delayed(DELAY_SECONDS))
        else:
            hosts[2].limit_rate(RATE)
        result = doctor(hosts, tmp_path)
    assert set(result.statuses) == {1}
    named = result.named()
    assert named["bandwidth"] == {"host2"}, result.text
    assert ("latency" in named) == (fault == "delayed")
    assert set().union(*named.values()) == {"host2"}, result.text
    assert "SLURM option to exclude these hosts: --exclude=host2" in result.text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slow_link_between_two_hosts_names_both(tmp_path: Path) -> None:
    need("ip", "tc")
    with some_hosts(2) as hosts:
        hosts[1].limit_rate(RATE)
        result = doctor(hosts, tmp_path)
    assert set(result.statuses) == {1}
    assert result.named() == {"bandwidth": {"host0", "host1"}}, result.text
    assert "- host0 and host1: bandwidth between them 1" in result.text
    assert "--exclude" not in result.text


SERVER = """
import sys, time
from pathlib import Path
from tests.support.serving import serve

def delay(handler, name, content):
    if handler.client_address[0] == sys.argv[3] and name.endswith(".tar"):
        time.sleep(0.3)
    return False

with serve(Path(sys.argv[1]), address=sys.argv[2], instead=delay) as site:
    print(site.url, flush=True)
    time.sleep(1000)
"""


@contextlib.contextmanager
def server_that_delays(slow: Host, *, on: Host, folder: Path, log: Path) -> Iterator[str]:
    """Serve a set on a host; requests of one host for shards are delayed. Yields the URL."""
    command = [sys.executable, "-c", SERVER, folder, on.address, slow.address]
    process = on.start(command, cwd=ROOT, env=environment(log.parent), log=log)
    try:
        wait_until(lambda: "http" in log.read_text() or process.poll() is not None, "the server")
        yield log.read_text().strip()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_with_slow_storage_is_named(tmp_path: Path, photos: Path) -> None:
    need("ip")
    with (
        some_hosts(3) as hosts,
        server_that_delays(hosts[1], on=hosts[0], folder=photos, log=tmp_path / "server.log") as url,
    ):
        result = doctor(hosts, tmp_path, url)
    assert set(result.statuses) == {1}
    assert result.named() == {"read": {"host1"}}, result.text
    assert "--exclude=host1" in result.text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_without_the_set_is_named(tmp_path: Path, photos: Path) -> None:
    """The other hosts are measured nevertheless."""
    need("ip")
    location = tmp_path / "set"
    shutil.copytree(photos, location)
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {location} && exec "$@"', "hidden")
    with some_hosts(3) as hosts:
        result = doctor(hosts, tmp_path, location, starts={1: Start(before=hide)})
    assert set(result.statuses) == {1}
    assert result.named() == {"failed": {"host1"}}, result.text
    assert (
        f"host1 rank 1 (cpu, {result.content['ranks'][0]['device_name']}): not measured: input: {location}: "
        in " ".join(result.text.split())
    )
    assert [rank["read"] is not None for rank in result.content["ranks"]] == [True, False, True]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_healthy_hosts_have_no_findings(tmp_path: Path, photos: Path) -> None:
    need("ip")
    with some_hosts(2) as hosts:
        result = doctor(hosts, tmp_path, photos)
    assert result.statuses == [0, 0], result.text
    assert result.content["findings"] == []
    assert "no problems found (2 ranks on 2 hosts" in result.text
    assert [pair["hosts"] for pair in result.content["network"]["pairs"]] == [["host0", "host1"]]
    assert all(rank["read"] and rank["decode"] and rank["matmul"] for rank in result.content["ranks"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path: Path) -> None:
    need("ip")
    with some_hosts(2) as hosts:
        port, logs = str(free_port()), [tmp_path / "0.log", tmp_path / "1.log"]
        processes: list[subprocess.Popen[str]] = []
        for number, host in enumerate(hosts):
            ranks = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            network = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "eth0"}
            env = environment(tmp_path, **ranks, **network, SLURMD_NODENAME=f"host{number}")
            processes.append(host.start([*DOCTOR], cwd=ROOT, env=env, log=logs[number]))
        wait_until(lambda: "doctor: device" in logs[0].read_text(), "the first measurement", seconds=120)
        hosts[1].kill()
        assert processes[0].wait(120) == 1
    lines = logs[0].read_text().splitlines()
    assert [line for line in lines if line.startswith("error: host host0: the ranks lost the connection")], lines
    assert "Traceback" not in logs[0].read_text()
