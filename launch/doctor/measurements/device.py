"""Speed of one rank's device: matrix multiplication and memory copy."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from launch.doctor.measurements.nvidia_smi import GpuQuery
from launch.doctor.measurements.report import GpuState
from launch.machine.affinity import pci_address
from launch.machine.device_peaks import COPIED, MATRIX, random_bytes, synchronize
from shards.cores import quota_periods

WARMUP_SECONDS = 0.2  # a GPU raises its clocks within this time
BLOCK_SECONDS = 0.02  # duration of one timed block of operations on a GPU
QUERY_SECONDS = 5.0  # longest wait for nvidia-smi, during which the GPU is kept busy
MEMORY_PARTS = 8  # of a GPU's free memory, of which the copy uses at most two
# On a CPU every core multiplies its own matrices, which fit into its cache, and copies its own memory, which does not.
CPU_MATRIX = 512
CPU_COPIED = 1 << 25
MAX_COPY_THREADS = 8  # enough to saturate the memory of one NUMA node
BLOCKS = 4


@dataclass(frozen=True)
class DeviceSpeed:
    """See the fields of `RankReport` with the same names."""

    matmul: float
    copy: float
    gpu: GpuState | None = None
    cpu_received: float | None = None
    throttled: float | None = None
    error: str | None = None
    """What could not be measured, and why."""


def measure_device(device: torch.device, *, threads: int, seconds: float) -> DeviceSpeed:
    """Measure a CPU for about two times `seconds`, or a GPU and the CPU time of its rank for about three times.

    Args:
        threads: number of CPU threads.
    """
    # First, because all ranks of a host begin at the same time: together they use the cores of the host.
    cpu = _measure_multiplication(threads, seconds)
    if device.type == "cuda":
        return replace(_measure_gpu(device, seconds), cpu_received=cpu.received, throttled=cpu.throttled)
    copy, _ = _cpu_rate(_copy, min(threads, MAX_COPY_THREADS), seconds)
    return DeviceSpeed(matmul=cpu.rate, copy=copy, cpu_received=cpu.received, throttled=cpu.throttled)


def _measure_gpu(device: torch.device, seconds: float) -> DeviceSpeed:
    generator = torch.Generator(device).manual_seed(0)  # the training's random numbers must not change
    products, query = _multiply_on_gpu(device, seconds, generator)
    moved = _copy_on_gpu(device, seconds, generator)
    error = "nvidia-smi: it does not end; look for errors of the driver in 'dmesg'" if query.timed_out else None
    return DeviceSpeed(matmul=products, copy=moved, gpu=query.state, error=error)


def _multiply_on_gpu(device: torch.device, seconds: float, generator: torch.Generator) -> tuple[float, GpuQuery]:
    side = MATRIX["cuda"]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    _gpu_rate(multiply, device, WARMUP_SECONDS)
    with GpuQuery(pci_address(device, domain_digits=8)) as query:
        rate = _gpu_rate(multiply, device, seconds, busy=lambda: not query.done())
    return 2 * side**3 * rate, query


def _copy_on_gpu(device: torch.device, seconds: float, generator: torch.Generator) -> float:
    free, _ = torch.cuda.mem_get_info(device)  # other processes may use the GPU
    source = random_bytes(min(COPIED["cuda"], free // MEMORY_PARTS // 8 * 8), device, generator)
    target = torch.zeros_like(source)
    return 2 * source.nbytes * _gpu_rate(lambda: target.copy_(source), device, seconds)


def _gpu_rate(
    work: Callable[[], object], device: torch.device, seconds: float, busy: Callable[[], bool] = lambda: False
) -> float:
    """Return the median number of calls per second, over blocks of `BLOCK_SECONDS`.

    Args:
        busy: continue for up to `QUERY_SECONDS` while this returns True.
    """
    repeats, rates = 1, list[float]()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or (busy() and elapsed < QUERY_SECONDS) or not rates:
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        spent = time.perf_counter() - begun
        if repeats == 1 and spent < BLOCK_SECONDS / 2:
            repeats = max(2, min(1000, int(BLOCK_SECONDS / max(spent, 1e-6))))  # the first call is not counted
            continue
        rates.append(repeats / spent)
    return statistics.median(rates)


@dataclass(frozen=True)
class _CpuMultiplication:
    rate: float
    """FLOP/s."""
    received: float
    throttled: float | None
    """See `RankReport`."""


def _measure_multiplication(threads: int, seconds: float) -> _CpuMultiplication:
    before = quota_periods()
    rate, received = _cpu_rate(_multiplication, threads, seconds)
    after = quota_periods()
    throttled = None
    if before is not None and after is not None:
        throttled = (after.throttled - before.throttled) / max(after.periods - before.periods, 1)
    return _CpuMultiplication(rate, received, throttled)


def _multiplication() -> tuple[Callable[[], object], float]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(CPU_MATRIX, CPU_MATRIX, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * CPU_MATRIX**3


def _copy() -> tuple[Callable[[], object], float]:
    source = torch.zeros(CPU_COPIED, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def _cpu_rate(
    prepare: Callable[[], tuple[Callable[[], object], float]], threads: int, seconds: float
) -> tuple[float, float]:
    """Run the same work in several threads, each on one core.

    The rate of a thread is relative to its CPU time, in the best of `BLOCKS` blocks, so that it does not depend on
    other processes or on a CPU quota. These are measured by the CPU time that the threads receive.

    Args:
        prepare: returns the work, and its amount per call. Called by each thread.

    Returns:
        The sum of the threads' amounts per second, and the fraction of the wall time in which the threads ran.
    """
    start = threading.Barrier(threads)
    results: list[tuple[float, float, float]] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(_run_thread(prepare, start, seconds))
        except Exception as error:
            failures.append(error)
            start.abort()  # the others do not wait for this thread

    before = torch.get_num_threads()
    workers = [threading.Thread(target=run, name="doctor") for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)  # MKL has one number for all threads
    if failures:
        raise failures[0]
    rates, cpu, wall = map(sum, zip(*results, strict=True))
    return rates, min(1.0, cpu / wall)


def _run_thread(
    prepare: Callable[[], tuple[Callable[[], object], float]], start: threading.Barrier, seconds: float
) -> tuple[float, float, float]:
    """Return the amount per second of CPU time in the best block, and the CPU time and wall time of all blocks."""
    torch.set_num_threads(1)  # of this thread
    work, amount = prepare()
    work()
    start.wait()
    rates, begun, begun_cpu = [], time.perf_counter(), time.thread_time()
    for block in range(1, BLOCKS + 1):
        block_cpu, calls = time.thread_time(), 0
        while calls == 0 or time.perf_counter() - begun < seconds * block / BLOCKS:
            work()
            calls += 1
        rates.append(amount * calls / max(time.thread_time() - block_cpu, 1e-9))
    return max(rates), time.thread_time() - begun_cpu, time.perf_counter() - begun
