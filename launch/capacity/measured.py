"""Read the JSON files of `pipeline bench` and `pipeline doctor`.

Only the fields that predictions use are validated; others are ignored, so that files of other versions can be read.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from shards.errors import UserError, describe_os_error
from shards.files.regular import NotRegular, read_bounded
from shards.redact import printable
from shards.schema import first_error

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 1 << 26
SMALL = 1 << 13
"""Bytes of an all-reduce whose time is that of its messages, not of its bytes."""
EXPECTED = "expected a file of 'pipeline bench --json' or 'pipeline doctor --json'"

# Times, rates and counts outside of these ranges are no measurements, and their products may overflow.
Positive = Annotated[float, Field(ge=1e-12, le=1e15, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 50)]


class MeasuredError(UserError):
    """A file of --measured is not what it should be."""


class _Phase(BaseModel, strict=True):
    rate: Positive
    cpu: NotNegative
    waiting: Annotated[float, Field(ge=0, le=1 - 1e-9)]
    host: NotNegative = 0.0
    times: tuple[Positive, ...] = ()


class _PathCost(BaseModel, strict=True):
    rate: Positive
    cpu: NotNegative


class _Settings(BaseModel, strict=True):
    model: str
    batch: Count
    size: Count
    ranks: Count = 1
    loader: str = ""
    engine: str = ""
    """'DeepSpeed ZeRO-N' or 'plain data parallel', followed by the precision."""
    compile: str = ""
    """The mode of --compile, followed by details."""

    @property
    def compile_mode(self) -> str:
        return re.split(r"[:, ]", self.compile, maxsplit=1)[0]

    @property
    def zero(self) -> int | None:
        """The ZeRO stage; None: not recorded."""
        stage = re.search(r"ZeRO-([1-3])", self.engine)
        return int(stage[1]) if stage else 0 if self.engine else None


class _Machine(BaseModel, strict=True):
    device: str
    cores: Count
    rank_cores: Count | None = None
    """CPU cores of the measured rank; None: written by a version that did not record it."""


class Bench(BaseModel, strict=True):
    """Figures of one rank (launch/bench/verdict.py)."""

    machine: _Machine
    settings: _Settings
    loader: _Phase
    model: _Phase
    both: _Phase
    decode_paths: dict[str, _PathCost] = {}
    memory: dict[str, int] = {}

    @property
    def on_gpu(self) -> bool:
        return bool(self.memory)

    @property
    def step_seconds(self) -> float:
        """Time of the device, or of the CPU, for a step.

        While batches are ready, the step of the whole training includes what the loader takes from it: its kernels on a
        GPU, its threads on a CPU.
        """
        training = self.both.rate / (1 - self.both.waiting)
        return self.settings.batch / min(self.model.rate, training)

    @property
    def launch_seconds(self) -> float:
        """Time in which the host launches a step. A launch waits while the queue of the device is full, so the shorter
        one counts."""
        return min(self.model.host, self.both.host)

    @property
    def rank_cores(self) -> float:
        return float(self.machine.rank_cores or max(1.0, self.machine.cores / self.settings.ranks))

    @property
    def decode_cpu(self) -> float:
        """CPU seconds per image of the loader. Those of a feed process are only in the figures of the decode paths."""
        path = self.decode_paths.get("stored pixels") or self.decode_paths.get("window")
        return max(self.loader.cpu, path.cpu if path else 0.0)

    @property
    def jitter(self) -> float:
        """Standard deviation of the step times on a GPU, relative to their mean; 0 if they were not measured."""
        times = self.model.times
        return statistics.stdev(times) / statistics.fmean(times) if len(times) > 1 else 0.0


class _AllReduce(BaseModel, strict=True):
    bytes: Count
    seconds: Positive


class _Pair(BaseModel, strict=True):
    latency: Positive
    bandwidth: Positive


class MeasuredAllReduces(BaseModel, strict=True):
    """Figures of collectives over all ranks, and of pairs of hosts."""

    latency: Positive
    all_reduce: tuple[_AllReduce, ...]
    pairs: tuple[_Pair, ...] = ()

    @property
    def small_all_reduce(self) -> float:
        """Seconds of an all-reduce of a few KiB, or of 8 bytes, if no small one was measured."""
        smallest = min(self.all_reduce, key=lambda entry: entry.bytes, default=None)
        return smallest.seconds if smallest is not None and smallest.bytes <= SMALL else self.latency


class _Node(BaseModel, strict=True):
    host: str
    local_ranks: Count
    cores: Count


class _Rank(BaseModel, strict=True):
    host: str
    device: str
    read: Positive | None = None


class Doctor(BaseModel, strict=True):
    """Figures of a job (launch/doctor/measurements/report.py)."""

    findings: tuple[dict[str, Any], ...] = ()
    nodes: Annotated[tuple[_Node, ...], Field(min_length=1)]
    ranks: Annotated[tuple[_Rank, ...], Field(min_length=1)]
    network: MeasuredAllReduces | None

    @property
    def on_gpu(self) -> bool:
        return self.ranks[0].device.startswith("cuda")

    @property
    def local_ranks(self) -> int:
        return max(node.local_ranks for node in self.nodes)

    @property
    def cores(self) -> int:
        """CPU cores of a node: the smallest number."""
        return min(node.cores for node in self.nodes)

    @property
    def storage(self) -> float | None:
        """Bytes/s that a node reads, the median of the nodes; None: not measured."""
        per_host: dict[str, float] = {}
        for rank in self.ranks:
            if rank.read is not None:
                per_host[rank.host] = per_host.get(rank.host, 0.0) + rank.read
        return statistics.median(per_host.values()) if per_host else None

    @property
    def all_reduces(self) -> MeasuredAllReduces | None:
        """Collectives over several ranks; None: not measured."""
        return self.network if len(self.ranks) > 1 else None

    @property
    def message_latency(self) -> float | None:
        """Seconds of a message between two hosts, the median of the pairs; None: not measured."""
        pairs = self.network.pairs if self.network else ()
        return statistics.median(pair.latency for pair in pairs) if pairs else None

    @property
    def message_bandwidth(self) -> float | None:
        """Bytes/s between two hosts, the median of the pairs; None: not measured."""
        pairs = self.network.pairs if self.network else ()
        return statistics.median(pair.bandwidth for pair in pairs) if pairs else None


@dataclass(frozen=True)
class Measured:
    """The files of --measured: any number of `pipeline bench`, of one model, and at most one of `pipeline doctor`."""

    benches: tuple[tuple[Path, Bench], ...] = ()
    doctor: tuple[Path, Doctor] | None = None


def read_measured(paths: Sequence[Path], model: str) -> Measured:
    """Read the files.

    Args:
        model: name of the model that is to be predicted.

    Raises:
        MeasuredError: a file is missing or of another kind, lacks a field, or is of another model.
    """
    benches, doctors = list[tuple[Path, Bench]](), list[tuple[Path, Doctor]]()
    for path in paths:
        content = _read(path)
        if "nodes" in content:
            doctors.append((path, _validate(path, content, Doctor, "doctor")))
        elif "loader" in content:
            benches.append((path, _validate(path, content, Bench, "bench")))
        else:
            raise MeasuredError(f"--measured {printable(path)}: neither figures of bench nor of doctor; {EXPECTED}")
    if len(doctors) > 1:
        raise MeasuredError(
            f"--measured: {printable(doctors[0][0])} and {printable(doctors[1][0])} are both of 'pipeline doctor'; use "
            "the one with more nodes"
        )
    for path, bench in benches:
        if bench.settings.model != model:
            name = printable(bench.settings.model[:60])
            raise MeasuredError(
                f"--measured {printable(path)}: measured {name}, not {model}; measure with 'pipeline bench SET -- "
                f"--model {model} ...', or use --model {name}"
            )
        first_path, first = benches[0]
        if (bench.machine.device, bench.settings.size) != (first.machine.device, first.settings.size):
            raise MeasuredError(
                f"--measured {printable(path)}: measured {printable(bench.machine.device)} at {bench.settings.size} "
                f"pixels, but {printable(first_path)} {printable(first.machine.device)} at {first.settings.size}; use "
                "files of one device and size"
            )
        mode, first_mode = bench.settings.compile_mode, first.settings.compile_mode
        if mode != first_mode:
            raise MeasuredError(
                f"--measured {printable(path)}: measured with --compile {printable(mode)}, but {printable(first_path)} "
                f"with {printable(first_mode)}; use files of one mode"
            )
    return Measured(tuple(benches), doctors[0] if doctors else None)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(path, MAX_BYTES))
    except FileNotFoundError:
        raise MeasuredError(f"--measured {printable(path)}: no such file; {EXPECTED}") from None
    except NotRegular as error:
        raise MeasuredError(f"--measured {printable(path)}: is {error.kind}; {EXPECTED}") from error
    except OSError as error:
        fact, _ = describe_os_error(path, error)
        raise MeasuredError(f"--measured {printable(path)}: cannot be read ({fact}); {EXPECTED}") from error
    except (ValueError, RecursionError):
        raise MeasuredError(f"--measured {printable(path)}: not valid JSON; {EXPECTED}") from None
    if not isinstance(content, dict):
        raise MeasuredError(f"--measured {printable(path)}: a {type(content).__name__}, not an object; {EXPECTED}")
    return content


def _validate(path: Path, content: dict[str, Any], schema: type[T], command: str) -> T:
    try:
        # From text, because strict validation of Python objects accepts no lists for tuples.
        return schema.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise MeasuredError(
            f"--measured {printable(path)}: {printable(first_error(error))}; write it again with 'pipeline {command} "
            "--json FILE'"
        ) from None
