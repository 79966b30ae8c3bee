"""Findings of `pipeline doctor`: which hosts and devices are named, and with which figures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from launch.doctor.findings import Finding, find, hosts_to_exclude
from launch.doctor.json_file import to_json
from launch.doctor.measurements.report import Report
from launch.doctor.tables import show
from launch.doctor.thresholds import Thresholds
from shards.errors import UserError
from tests.support.doctors import GIB, GPU, healthy, with_node, with_rank, with_slow_link

DEFAULTS = Thresholds()


def messages(report: Report, limits: Thresholds = DEFAULTS) -> list[str]:
    return [finding.message for finding in find(report, limits)]


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_a_healthy_job_has_no_findings(nodes: int) -> None:
    assert find(healthy(nodes), DEFAULTS) == []


JOB = healthy()
SLOW_CPU = {"device": "cpu", "gpu": None, "device_name": "EPYC", "cpu_received": 1.0}
ON_CPUS = replace(JOB, ranks=tuple(replace(rank, **SLOW_CPU) for rank in JOB.ranks))
FAULTS = {
    "slow GPU": (
        with_rank(JOB, 3, matmul=350e12),
        ("matmul", "n1 rank 3 (cuda:1, NVIDIA H200): matrix multiplication 350.0 TFLOP/s, median 700.0 TFLOP/s, "
         "ratio 0.50"),
    ),
    "slow GPU memory": (
        with_rank(JOB, 0, copy=1.95e12),
        ("copy", "n0 rank 0 (cuda:0, NVIDIA H200): memory copy 1,950.00 GB/s, median 3,900.00 GB/s, ratio 0.50"),
    ),
    "hot GPU": (
        with_rank(JOB, 3, gpu=replace(GPU, clock=1200, throttle_reasons=("power cap", "hardware thermal slowdown"))),
        ("gpu-throttled", "n1 rank 3 (cuda:1, NVIDIA H200): clocks reduced by hardware thermal slowdown (1200 of 1980"),
    ),
    "memory errors": (
        with_rank(JOB, 5, gpu=replace(GPU, ecc_uncorrected=2)),
        ("gpu-memory-errors", "n2 rank 5 (cuda:1, NVIDIA H200): 2 uncorrected memory errors"),
    ),
    "failed measurement": (
        with_rank(JOB, 5, read=None, errors=("input: /data: missing",)),
        ("failed", "n2 rank 5 (cuda:1, NVIDIA H200): not measured: input: /data: missing"),
    ),
    "library": (with_node(JOB, 2, libraries="torch 3"), ("versions", "n2: libraries torch 3, expected torch 2")),
    "driver": (with_node(JOB, 1, driver="570"), ("versions", "n1: GPU driver 570, expected 580.65.06")),
    "code": (with_node(JOB, 1, code="def"), ("versions", "n1: code def, expected abc")),
    "few cores": (
        with_node(JOB, 1, cores=16, cores_limit="CPU quota"),
        ("cores", "n1: 16 of 32 CPU cores usable (CPU quota), median of the hosts 32"),
    ),
    "one core per GPU": (with_node(JOB, 1, rank_cores=1), ("cores-per-gpu", "only one CPU core per GPU on n1")),
    "little memory": (
        with_node(JOB, 0, memory=128 * GIB),
        ("memory", "n0: 128.0 GiB of memory, median 256.0 GiB, ratio 0.50"),
    ),
    "small shm": (with_node(JOB, 0, shm=GIB // 16), ("shm", "n0: /dev/shm has 64 MiB, less than 0.5 GiB")),
    "open files": (
        with_node(JOB, 2, open_files=1024, open_files_hard=1024),
        ("open-files", "n2: the limit of open files is 1,024 (hard limit 1,024), less than 4,096"),
    ),
    "clock ahead": (with_node(JOB, 2, clock_offset=3.0), ("clock-skew", "n2: its clock is 3.00 s ahead of the median")),
    "latency": (
        with_slow_link(JOB, "n1", latency=100),
        ("latency", "n1: latency to other hosts 2,000 us, median 20 us, ratio 100.00"),
    ),
    "bandwidth": (
        with_slow_link(JOB, "n1", bandwidth=0.1),
        ("bandwidth", "n1: bandwidth to other hosts 4.00 GB/s, median 40.00 GB/s, ratio 0.10"),
    ),
    "slow disk": (
        with_rank(with_rank(JOB, 4, read=1e8), 5, read=1e8),
        ("read", "n2: reads shards at 0.20 GB/s, median 2.00 GB/s, ratio 0.10"),
    ),
    "slow decoding": (
        with_rank(with_rank(JOB, 4, decode=10.0), 5, decode=10.0),
        ("decode", "n2: decodes 20 images/s, median 4,000 images/s, ratio 0.01"),
    ),
    "CPU quota": (
        with_rank(ON_CPUS, 1, cpu_received=0.7, throttled=0.9),
        ("cpu-quota", "n0 rank 1 (cpu, EPYC): its CPU quota stops it: its threads ran in 70% of the time"),
    ),
    "CPU quota of a rank with a GPU": (
        with_rank(JOB, 1, cpu_received=0.7, throttled=0.9),
        ("cpu-quota", "n0 rank 1 (cuda:1, NVIDIA H200): its CPU quota stops it: its threads ran in 70% of the time"),
    ),
    "other processes on the cores of a rank with a GPU": (
        with_rank(JOB, 1, cpu_received=0.4),
        ("cpu-load", "n0 rank 1 (cuda:1, NVIDIA H200): other processes use its CPU cores: its threads ran in 40%"),
    ),
    "other processes": (
        with_rank(ON_CPUS, 1, cpu_received=0.4),
        ("cpu-load", "n0 rank 1 (cpu, EPYC): other processes use its CPU cores: its threads ran in 40% of the time"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_named(fault: str) -> None:
    report, (kind, message) = FAULTS[fault]
    found = find(report, DEFAULTS)
    assert [(finding.kind, finding.message.startswith(message)) for finding in found] == [(kind, True)], found
    host = "n0" if "n0" in message else "n1" if "n1" in message else "n2"
    assert found[0].hosts == (host,)
    assert hosts_to_exclude(found, report) == [host]


def test_the_clock_of_rank_0_may_be_the_wrong_one() -> None:
    report = with_node(with_node(JOB, 1, clock_offset=-5.0), 2, clock_offset=-5.0)
    assert [finding.hosts for finding in find(report, DEFAULTS)] == [("n0",)]


def test_an_unknown_driver_is_not_another_version() -> None:
    assert find(with_node(JOB, 1, driver=None), DEFAULTS) == []


def test_an_inexact_clock_is_not_reported() -> None:
    assert find(with_node(JOB, 1, clock_offset=1.5, clock_error=1.0), DEFAULTS) == []


def test_a_slow_rank_on_a_cpu_is_explained_by_its_cores() -> None:
    report = with_node(with_rank(ON_CPUS, 2, matmul=350e12), 1, rank_cores=8, cores=16, cores_limit="CPU quota")
    _, matmul = messages(report)
    assert matmul.endswith("ratio 0.50; it has 8 CPU cores (CPU quota)")


def test_devices_are_compared_only_with_devices_of_the_same_name() -> None:
    ranks = tuple(
        replace(rank, device_name="NVIDIA L4", matmul=100e12, copy=3e11) if rank.host == "n2" else rank
        for rank in JOB.ranks
    )
    other = with_node(replace(JOB, ranks=ranks), 2, cores=8, memory=64 * GIB)  # another type of host
    assert find(other, DEFAULTS) == []


@pytest.mark.parametrize(("fraction", "kinds"), [(0.7, []), (0.5, ["copy"])])
def test_the_memory_of_a_cpu_may_be_slowed_by_other_processes(fraction: float, kinds: list[str]) -> None:
    report = with_rank(ON_CPUS, 1, copy=fraction * 3.9e12)
    assert [finding.kind for finding in find(report, DEFAULTS)] == kinds


def test_both_hosts_of_a_slow_pair_are_named_if_they_met_no_others() -> None:
    """In the first round, after which a slow connection leaves no time for others."""
    report = with_slow_link(healthy(7), "n0", latency=1000, bandwidth=0.001)
    assert report.network is not None
    pairs = tuple(pair for pair in report.network.pairs if pair.hosts in {("n0", "n5"), ("n1", "n4"), ("n2", "n3")})
    found = find(replace(report, network=replace(report.network, pairs=pairs)), DEFAULTS)
    assert [(finding.kind, finding.hosts) for finding in found] == [
        ("latency", ("n0", "n5")),
        ("bandwidth", ("n0", "n5")),
    ]
    assert hosts_to_exclude(found, report) == []


def test_all_devices_of_one_of_two_hosts_may_be_slow() -> None:
    report = healthy(2)
    report = with_rank(with_rank(report, 2, matmul=560e12), 3, matmul=560e12)
    assert [(finding.kind, finding.rank) for finding in find(report, DEFAULTS)] == [("matmul", 2), ("matmul", 3)]


def test_one_slow_host_does_not_accuse_the_others_of_three() -> None:
    report = with_slow_link(JOB, "n0", latency=1000, bandwidth=0.001)
    assert {finding.hosts for finding in find(report, DEFAULTS)} == {("n0",)}


def test_of_two_hosts_both_are_named_as_a_pair_and_none_is_excluded() -> None:
    report = with_slow_link(healthy(2), "n0", latency=1000, bandwidth=0.001)
    found = find(report, DEFAULTS)
    assert [(finding.kind, finding.hosts) for finding in found] == [
        ("latency", ("n0", "n1")),
        ("bandwidth", ("n0", "n1")),
    ]
    assert "n0 and n1: latency between them 20.0 ms, more than 5,000 us" in found[0].message
    assert "less than 0.1 GB/s" in found[1].message
    assert hosts_to_exclude(found, report) == []


def test_a_majority_is_not_excluded() -> None:
    report = with_node(with_node(JOB, 0, open_files=100), 1, open_files=100)
    assert hosts_to_exclude(find(report, DEFAULTS), report) == []


def test_differences_of_latency_below_the_noise_are_not_reported() -> None:
    assert find(with_slow_link(JOB, "n1", latency=20), DEFAULTS) == []


@pytest.mark.parametrize(
    ("fault", "looser"),
    [
        ("slow GPU", {"slow": 0.4}),
        ("bandwidth", {"slow_network": 0.05}),
        ("slow disk", {"slow_input": 0.05}),
        ("latency", {"max_latency_ratio": 200.0}),
        ("clock ahead", {"max_skew": 5.0}),
        ("open files", {"min_open_files": 1000}),
        ("small shm", {"min_shm": 0.01}),
    ],
)
def test_thresholds_are_options(fault: str, looser: dict[str, float]) -> None:
    report, _ = FAULTS[fault]
    assert find(report, Thresholds(**looser)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("absolute", "kind"), [({"max_latency": 1e-6}, "latency"), ({"min_bandwidth": 100.0}, "bandwidth")]
)
def test_absolute_limits_apply_to_all_hosts(absolute: dict[str, float], kind: str) -> None:
    found = find(JOB, Thresholds(**absolute))  # type: ignore[arg-type]
    assert [(finding.kind, finding.hosts) for finding in found] == [(kind, ("n0",)), (kind, ("n1",)), (kind, ("n2",))]


def test_a_threshold_out_of_range_is_rejected() -> None:
    with pytest.raises(UserError, match="--slow-network 2: expected a number from 0 to 1"):
        Thresholds(slow_network=2.0)


def printed(report: Report, found: list[Finding], capsys: pytest.CaptureFixture[str]) -> str:
    show(report, found, hosts_to_exclude(found, report), Console(width=80, highlight=False))
    return capsys.readouterr().out


def test_tables_fit_into_80_columns_and_show_the_smallest_of_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = FAULTS["slow GPU"]
    found = find(report, DEFAULTS)
    text = printed(report, found, capsys)
    tables, _, problems = text.partition("1 problem found")
    assert max(map(len, tables.splitlines())) <= 80
    assert problems.splitlines()[1] == f"- {found[0].message}"
    words = " ".join(text.split())
    assert "min 350.0" in words
    assert "1 problem found (6 ranks on 3 hosts, 20 s):" in words
    assert words.endswith("SLURM option to exclude these hosts: --exclude=n1")
    assert "no problems found (6 ranks on 3 hosts, 20 s)" in printed(JOB, [], capsys)


def test_the_option_that_excludes_hosts_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    show(JOB, [Finding(kind="shm", hosts=("n1",), message="")], [f"node-{n:04}" for n in range(30)], Console(width=80))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("SLURM option to exclude these hosts: --exclude=node-0000,node-0001,")
    assert last.endswith(",node-0029")


def test_only_the_slowest_of_many_pairs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(with_slow_link(healthy(8), "n7", bandwidth=0.9), [], capsys)
    assert "pairs of hosts, the slowest 10 of 28" in text
    assert text.count("n7 ") + text.count("- n7") >= 7


def test_json_has_findings_limits_and_measurements() -> None:
    report, _ = FAULTS["slow GPU"]
    found = find(report, DEFAULTS)
    content = json.loads(json.dumps(to_json(report, found, ["n1"], DEFAULTS)))
    assert content["findings"][0]["value"] == 350e12
    assert (content["findings"][0]["median"], content["findings"][0]["rank"]) == (700e12, 3)
    assert (content["exclude"], content["limits"]["slow"]) == (["n1"], 0.85)
    assert [rank["matmul"] for rank in content["ranks"]].count(700e12) == 5
    assert content["nodes"][2]["host"] == "n2"
