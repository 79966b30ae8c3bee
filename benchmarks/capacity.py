"""Compare the predictions of `pipeline capacity` with trainings on 1, 2 and 4 simulated hosts on this machine.

    python benchmarks/capacity.py [--out benchmarks/results/capacity.json]

Each host is a network namespace with one rank (gloo), whose control group limits it to a part of a CPU core, so that
the time of computing does not depend on the number of ranks. Their links are limited (tc) and delayed.
For each network:

1. `pipeline bench` on one host, with the batch sizes per rank of 1 and of 4 ranks (once for all networks)
2. `pipeline doctor` on two hosts
3. launch/train.py on 1 (once), 2 and 4 hosts with the same global batch: the median time of a step from metrics.jsonl
4. `pipeline capacity` with the files of 1 and 2: the predicted time of a step

Needs root and the programs ip, tc and nsenter. Takes about 25 minutes on two cores. Stop other programs meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from benchmarks.interleaved import machine
from launch.capacity.options import Capacity
from launch.capacity.plan import plan
from tests.support.cpu_quota import change_quota, cpu_quota, joined
from tests.support.hosts import Host, some_hosts
from tests.support.launching import ROOT, environment, free_port
from tests.support.waiting import wait_until

RANKS = (1, 2, 4)
PERIOD = 4_000  # microseconds: with the usual 100 ms, ranks would wait long for one that its quota has stopped
START_CORES = 1.0  # until the first steps are done
# Other programs must not take the time that the quotas allow.
NICENESS, SHARES = -10, 10240
PIPELINE = (sys.executable, "-m", "launch.cli")


@dataclass(frozen=True)
class Setting:
    """A network between the hosts, and options of the training."""

    name: str
    rate: str | None = None
    """Rate at which a host sends, as for tc."""
    delay: float = 0.0
    """Seconds by which each packet is delayed on its way to and from a host."""
    sync_bn: str = "off"
    zero: int = 0


SETTINGS = (
    Setting("fast"),
    Setting("200 Mbit/s", rate="200mbit"),
    Setting("2 ms delay", delay=0.002),
    Setting("200 Mbit/s, 2 ms delay", rate="200mbit", delay=0.002),
    # So long that waiting for the next period of a quota, which each message may do, is short compared to it.
    Setting("8 ms delay, BatchNorm over 2 ranks", delay=0.008, sync_bn="group:2"),
    Setting("200 Mbit/s, ZeRO 1", rate="200mbit", zero=1),
)


@dataclass(frozen=True)
class Options:
    cores: float = 0.25
    """CPU cores of each rank."""
    variant: str = "b0"
    size: int = 64
    """Height and width of the images."""
    global_batch: int = 32
    steps: int = 4
    """Steps of each timed interval."""
    intervals: int = 3
    """Number of timed intervals, of which the median counts."""
    only: tuple[str, ...] = ()
    """Names of the networks; all by default."""
    work: Path | None = None
    """Folder for intermediate files; those of an interrupted run are reused."""
    out: Path | None = None
    """JSON file for the results."""

    @property
    def training(self) -> tuple[str, ...]:
        """Options of the training that do not depend on the network."""
        return ("--variant", self.variant, "--size", str(self.size), "--decode-threads", "1")


@dataclass
class Lab:
    """Simulated hosts, each with a control group for its rank."""

    hosts: Sequence[Host]
    groups: Sequence[Path]
    folder: Path
    options: Options
    data: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, ranks: int, command: Sequence[str | Path], name: str, *, cores: float) -> list[subprocess.Popen[str]]:
        """Start a command as one rank on each of the first hosts."""
        port, started = str(free_port()), []
        for rank, (host, group) in enumerate(zip(self.hosts[:ranks], self.groups[:ranks], strict=True)):
            change_quota(group, cores, period=PERIOD)
            env = environment(
                self.folder,
                RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                MASTER_ADDR=self.hosts[0].address, MASTER_PORT=port, GLOO_SOCKET_IFNAME="eth0",
                SLURMD_NODENAME=f"host{rank}", OMP_NUM_THREADS="1",
            )  # fmt: skip
            with (self.folder / f"{name}-{rank}.log").open("w") as log:
                # Not `ip netns exec`, which hides the control groups, so that the rank would not see its quota.
                inside = (*joined(group), "nsenter", f"--net=/run/netns/{host.name}", "--", *map(str, command))
                process = subprocess.Popen(
                    inside, cwd=ROOT, env=env, stdout=log, stderr=log, text=True, start_new_session=True
                )
            started.append(process)
            host.started.append(process)
        return started

    def finish(self, processes: Sequence[subprocess.Popen[str]], name: str, *, statuses: Sequence[int] = (0,)) -> None:
        for process in processes:
            if process.wait(900) not in statuses:
                raise RuntimeError(f"{name}: status {process.returncode}, see the logs in {self.folder}")

    def bench(self, batch: int) -> Path:
        """Measure one rank with `batch` images per step."""
        out = self.folder / f"bench-{batch}.json"
        if not out.exists():
            print(f"bench with batch {batch}", flush=True)
            command: tuple[str | Path, ...] = (
                *PIPELINE, "bench", self.data, "--steps", "4", "--json", out, "--chart", out.with_suffix(".png"),
                "--", *self.options.training, "--global-batch", str(batch),
            )  # fmt: skip
            self.finish(self.run(1, command, out.stem, cores=self.options.cores), "bench")
        return out

    def doctor(self, setting: Setting) -> Path:
        """Measure the network between two ranks."""
        out = self.folder / f"doctor {setting.name}.json".replace("/", " ")
        if not out.exists():
            print(f"doctor, {setting.name}", flush=True)
            command = (*PIPELINE, "doctor", "--json", out)
            processes = self.run(2, command, "doctor", cores=self.options.cores)
            self.finish(processes, "doctor", statuses=(0, 1))
        return out

    def train(self, setting: Setting, ranks: int) -> dict[str, float]:
        """Return the median seconds of a step, and the fractions of waiting for data and for collectives."""
        name = f"train {ranks} {setting.name}".replace("/", " ")
        saved = self.folder / f"{name}.json"
        if not saved.exists():
            options = self.options
            run = self.folder / "runs" / f"{name.replace(' ', '-')}-{time.time_ns()}"
            command: tuple[str | Path, ...] = (
                sys.executable, "launch/train.py", *options.training, "--data", self.data, "--out", run,
                "--global-batch", str(options.global_batch), "--log-every", str(options.steps), "--epochs", "100",
                "--eval-every", "100", "--sync-bn", setting.sync_bn if ranks > 1 else "off",
                "--zero", str(setting.zero if ranks > 1 else 0), "--no-check-nodes",
            )  # fmt: skip
            processes = self.run(ranks, command, "train", cores=START_CORES)
            try:
                self._wait(run, 1, processes)
                for group in self.groups[:ranks]:
                    change_quota(group, options.cores, period=PERIOD)
                # The first interval, and the one in which the quota changed, do not count.
                lines = self._wait(run, 2 + options.intervals, processes)[2:]
            finally:
                for host in self.hosts[:ranks]:
                    host.kill()
                for process in processes:
                    process.wait()
            seconds = [line["seconds"] / line["steps"] for line in lines]
            found = {"seconds": statistics.median(seconds), "smallest": min(seconds), "largest": max(seconds)}
            for key in ("data_wait", "communication"):
                found[key] = statistics.median(line.get(key) or 0.0 for line in lines)
            saved.write_text(json.dumps(found))
        return dict(json.loads(saved.read_text()))

    def _wait(self, run: Path, count: int, processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
        """Wait until a run has logged `count` intervals, and return them."""

        def lines() -> list[dict[str, Any]]:
            path = run / "metrics.jsonl"
            text = path.read_text() if path.exists() else ""
            found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            return [line for line in found if line["kind"] == "train"]

        def ended() -> bool:
            return any(process.poll() is not None for process in processes)

        wait_until(lambda: len(lines()) >= count or ended(), f"{count} intervals of {run}", seconds=1800)
        if len(lines()) < count:
            raise RuntimeError(f"{run}: the training ended early, see the logs in {self.folder}")
        return lines()[:count]


@contextlib.contextmanager
def network(setting: Setting, options: Options, folder: Path, data: Path) -> Iterator[Lab]:
    """Create the hosts of a setting."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(some_hosts(max(RANKS)))
        groups = [stack.enter_context(cpu_quota(START_CORES, period=PERIOD)) for _ in hosts]
        for host in hosts:
            # TCP begins slowly again after a pause, which the steps make between their collectives.
            inside = ("ip", "netns", "exec", host.name, "sysctl", "-q", "-w", "net.ipv4.tcp_slow_start_after_idle=0")
            subprocess.run(inside, check=True)
            if setting.rate:
                host.limit_rate(setting.rate)
            if setting.delay:
                stack.enter_context(host.delayed(setting.delay))
        for group in groups:
            with contextlib.suppress(FileNotFoundError):  # of version 1 of control groups
                group.with_name("cpu.shares").write_text(str(SHARES))
        lab = Lab(hosts, groups, folder, options, data)
        yield lab
        for host in hosts:  # before the control groups are removed
            host.kill()


def compare(
    lab: Lab, setting: Setting, benches: Sequence[Path], numbers: Sequence[int] = RANKS
) -> list[dict[str, Any]]:
    """Measure and predict a setting, for some numbers of ranks."""
    options, doctor, rows = lab.options, lab.doctor(setting), []
    for ranks in numbers:
        measured = lab.train(setting, ranks)
        predicted = plan(
            Capacity(
                model=f"fat_{options.variant}", size=options.size, nodes=str(ranks), gpus_per_node=1,
                data=str(lab.data), global_batch=str(options.global_batch),
                sync_bn=setting.sync_bn if ranks > 1 else "off", zero=setting.zero, measured=(*benches, doctor),  # type: ignore[arg-type]
            )
        ).steps[options.global_batch][0]  # fmt: skip
        rows.append(
            {
                "network": setting.name,
                "ranks": ranks,
                "predicted_seconds": round(predicted.seconds, 4),
                "measured_seconds": round(measured["seconds"], 4),
                "ratio": round(predicted.seconds / measured["seconds"], 3),
                "limit": predicted.limit,
                "terms": {name: round(seconds, 4) for name, seconds in predicted.terms.items()},
                "measured": {name: round(value, 4) for name, value in measured.items()},
            }
        )
        print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['network']:36s}{row['ranks']} ranks  predicted {row['predicted_seconds']:.3f} s  measured "
        f"{row['measured_seconds']:.3f} s  ratio {row['ratio']:.2f}  {row['limit']}, communication "
        f"{row['measured']['communication']:.0%}"
    )


def digits(folder: Path) -> Path:
    """Create the shard set."""
    if not (folder / "set" / "dataset.json").exists():
        for command in (("sample", "digits", folder / "images"), ("shard", folder / "images", "--out", folder / "set")):
            subprocess.run([*PIPELINE, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "set"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    settings = [setting for setting in SETTINGS if not options.only or setting.name in options.only]
    rows: list[dict[str, Any]] = []
    os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have set the first to be ignored
        signal.signal(number, lambda *_: sys.exit("interrupted"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(exist_ok=True)
        data = digits(folder)
        with network(SETTINGS[0], options, folder, data) as lab:
            benches = [lab.bench(options.global_batch // ranks) for ranks in (max(RANKS), min(RANKS))]
        for setting in settings:
            with network(setting, options, folder, data) as lab:  # a single rank does not use the network
                rows += compare(lab, setting, benches, RANKS if setting is settings[0] else RANKS[1:])
    results = {
        "machine": machine(torch.device("cpu")),
        "settings": {
            "model": f"fat_{options.variant}", "size": options.size, "global_batch": options.global_batch,
            "cores_per_rank": options.cores, "steps": options.steps, "intervals": options.intervals,
        },
        "comparisons": rows,
    }  # fmt: skip
    print(f"ratios {min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
