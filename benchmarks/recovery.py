"""Measure the time from the death of a rank to the next new step, by what starts the run again and from where.

    requeue      the batch script requeues the job: the time limit leaves no time for a restart in the allocation
    allocation   the batch script starts the run again with srun in the same allocation
    torchrun     torchrun's agents start the processes again (--max-restarts)

each with checkpoints in the run folder only, and with local checkpoints (--local-checkpoint-every) in addition. FAT-B0
trains on digits with two ranks, each on a core of this machine: on two nodes of a local SLURM cluster, or under two
agents of torchrun. Some seconds after a checkpoint in the run folder, rank 1 is killed with SIGKILL. A figure depends
on this time (--after), because the steps since the checkpoint are repeated: on average half the interval between two
checkpoints. The requeued job finds free nodes at once, and SLURM is configured to start it again after 5 s instead of
two minutes, so that the queue is as short as it can be.

    python benchmarks/recovery.py [--after 60] [--out FILE.json]

Needs root, and the programs that `make test-slurm` installs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from benchmarks.interleaved import machine
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import OPTIONS, RECORDED, start_job
from tests.support.commands import run_pipeline
from tests.support.launching import ROOT, environment, free_port, lines
from tests.support.runs import process_of_rank

ENGINES = ("requeue", "allocation", "torchrun")
SAVE_AT = 5  # step of the checkpoint in the run folder
EPOCH = 179  # steps; another checkpoint in the run folder is written at its end
SECONDS = 600  # for a start, or for a recovery


@dataclasses.dataclass(frozen=True)
class Options:
    after: float = 60
    """Seconds from the checkpoint in the run folder to the death of a rank."""
    local_every: int = 5
    """Steps between local checkpoints."""
    pace: float = 0.7
    """Seconds per step in addition to its work."""
    rounds: int = 1
    """How often each combination is measured, alternately."""
    out: Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What happened after a rank was killed. Times in seconds."""

    until_first_step: float
    """From the death to the end of the first step of the next start."""
    until_new_step: float
    """From the death to the end of the first step that had not been done before."""
    steps_lost: int
    """Steps that were repeated."""
    step_seconds: float
    """Median time per step before the death."""


def trained(run: Path) -> list[dict[str, Any]]:
    """Return the lines of training steps in the metrics of a run."""
    return lines(run, "train") if (run / "metrics.jsonl").exists() else []


def recovery(run: Path, after: float) -> Recovery:
    """Kill rank 1 of a run some seconds after a checkpoint, and wait for the next new step."""
    wait_until(lambda: len(trained(run)) >= SAVE_AT, f"step {SAVE_AT}", SECONDS)
    (run / "SAVE").touch()
    wait_until(lambda: list(run.glob("checkpoints/step-*")), "a checkpoint", SECONDS)
    time.sleep(after)
    victim = process_of_rank(run, 1)
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    time.sleep(1)  # a line of the last step may still be written
    before = [line for line in trained(run) if line["time"] <= killed + 1]
    last = before[-1]["step"]

    def new() -> list[dict[str, Any]]:
        return [line for line in trained(run) if line["time"] > before[-1]["time"]]

    wait_until(lambda: any(line["step"] > last for line in new()), f"step {last + 1} after the death", SECONDS)
    first = new()[0]
    end = next(line for line in new() if line["step"] > last)
    if last >= EPOCH:
        raise RuntimeError(f"{run}: more than an epoch was trained; use a larger --pace, or a smaller --after")
    times = [line["time"] for line in before]
    return Recovery(
        until_first_step=first["time"] - killed,
        until_new_step=end["time"] - killed,
        steps_lost=last - first["step"] + 1,
        step_seconds=statistics.median(b - a for a, b in itertools.pairwise(times)),
    )


@contextmanager
def slurm(cluster: Cluster, run: Path, options: tuple[str | Path, ...], pace: str, *limit: str) -> Iterator[None]:
    """Train in a job of two nodes."""
    job = start_job(cluster, run, "--nodes", "2", *limit, options=options, PACE=pace)
    try:
        yield
    finally:
        cluster.run("scancel", str(job.number), check=False)
        wait_until(lambda: not cluster.run("squeue", "-h").stdout, "empty queue", 240)
        cluster.wait_for_silence()


@contextmanager
def torchrun(run: Path, options: tuple[str | Path, ...], pace: str) -> Iterator[None]:
    """Train under two agents of torchrun, each on a core."""
    cores, endpoint = sorted(os.sched_getaffinity(0)), f"127.0.0.1:{free_port()}"
    run.mkdir(parents=True)
    agents = []
    try:
        for number in range(2):
            command = (
                *("taskset", "--cpu-list", str(cores[number % len(cores)])),
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint),
                *(RECORDED, *OPTIONS, "--out", run, *options),
            )
            with (run.parent / f"{run.name}-{number}.log").open("w") as log:
                agents.append(
                    subprocess.Popen(
                        list(map(str, command)), cwd=ROOT, stdout=log, stderr=log,
                        env=environment(run.parent, PACE=pace, OMP_NUM_THREADS="1"),
                    )
                )  # fmt: skip
        yield
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait()


def measure(engine: str, training: tuple[str | Path, ...], cluster: Cluster, run: Path, options: Options) -> Recovery:
    """Measure one recovery."""
    pace = str(options.pace)
    starts: dict[str, Callable[[], Any]] = {
        "requeue": lambda: slurm(cluster, run, training, pace, "--time", "9"),
        "allocation": lambda: slurm(cluster, run, training, pace),
        "torchrun": lambda: torchrun(run, training, pace),
    }
    with starts[engine]():
        return recovery(run, options.after)


def main(options: Options) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stop SLURM's daemons, as after Ctrl-C
    measured: dict[str, list[Recovery]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recovery-")))
        run_pipeline("sample", "digits", folder / "images")
        run_pipeline("shard", folder / "images", "--out", folder / "set", "--shard-size", "1")
        (folder / "cluster").mkdir()
        cluster = stack.enter_context(Cluster(folder / "cluster", nodes=2))
        training = ("--data", folder / "set", "--global-batch", "8", "--zero", "0", "--save-every", "100000")
        sources = {"run folder": training, "local": (*training, "--local-checkpoint-every", str(options.local_every))}
        for number, engine, source in itertools.product(range(options.rounds), ENGINES, sources):
            name, run = f"{engine}, {source}", folder / f"run-{number}-{engine}-{source.replace(' ', '-')}"
            found = measure(engine, sources[source], cluster, run, options)
            measured.setdefault(name, []).append(found)
            shutil.rmtree(run)
            print(
                f"{name:24s} first step after {found.until_first_step:5.1f} s, new step after "
                f"{found.until_new_step:5.1f} s; {found.steps_lost} steps of {found.step_seconds:.2f} s repeated",
                flush=True,
            )
    medians = {name: statistics.median(x.until_new_step for x in found) for name, found in measured.items()}
    slowest = medians["requeue, run folder"]
    ratios = {name: round(slowest / seconds, 2) for name, seconds in medians.items()}
    for name, ratio in ratios.items():
        print(f"{name:24s} {medians[name]:5.1f} s   {ratio:.1f} times as fast as a requeue with the run folder only")
    if options.out is not None:
        content = {
            "machine": machine(torch.device("cpu")),
            "settings": {name: value for name, value in dataclasses.asdict(options).items() if name != "out"},
            "results": {name: [dataclasses.asdict(x) for x in found] for name, found in measured.items()},
            "times_as_fast_as_requeue": ratios,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
