"""`pipeline capacity`: sources of the figures, errors, tables and JSON."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.capacity import reference
from launch.capacity.bandwidth import parse_rate
from launch.capacity.costs.network import Topology
from launch.capacity.json_file import to_json
from launch.capacity.measured import read_measured
from launch.capacity.options import Capacity
from launch.capacity.plan import Plan, plan
from launch.capacity.tables import describe, show
from launch.cli import main
from launch.models.specification import Variant
from shards.errors import UserError
from tests.support.capacity_files import bench, cpu_doctor, write
from tests.support.doctors import healthy
from tests.support.launching import ROOT


def kinds(found: Plan) -> dict[str, str]:
    return {figure.name: figure.kind for figure in found.figures}


def test_without_measurements_the_figures_are_references_and_assumptions() -> None:
    found = plan(Capacity(variant="b3", nodes="1,4"))
    assert set(kinds(found).values()) == {"reference", "assumed"}
    assert found.device == "NVIDIA H200"
    assert (found.cluster.zero, found.cluster.sync_bn, found.cluster.overlaps) == (1, 0, True)
    (one, four) = found.steps[1024]
    assert (one.rank_batch, four.rank_batch) == (128, 32)
    assert one.terms["compute"] == pytest.approx(128 / 3056.3, rel=0.02)
    assert found.training_steps(1024) == 300 * (1_281_167 // 1024) == 375_300
    assert found.hours(one) == pytest.approx(375_300 * one.seconds / 3600)


def test_options_come_before_measurements_and_measurements_before_references(tmp_path: Path) -> None:
    files = write(tmp_path / "b.json", bench(seconds=2.0)), cpu_doctor(tmp_path / "d.json", latency=1e-3)
    found = plan(Capacity(nodes="1,2", global_batch="32", measured=files))
    assert (found.device, found.cluster.local_ranks, found.cluster.zero, found.cluster.sync_bn) == ("CPU", 1, 0, None)
    assert kinds(found) == {
        "training images": "assumed",
        "training step": "measured",
        "CPU cores per node": "measured",
        "decoding per node": "measured",
        "storage per node": "measured",
        "all-reduce over 2 ranks": "measured",
    }
    one, two = found.steps[32]
    assert one.seconds == pytest.approx(4.0)
    assert two.terms["compute"] == pytest.approx(2.0)
    assert two.terms["gradient all-reduce"] == pytest.approx(
        2e-3 + found.cluster.workload.gradient_bytes / 1e8, rel=1e-3
    )

    other = Capacity(
        nodes="1,2", global_batch="32", measured=files, cores_per_node=4, storage="1 MB/s", network="1 Gbit/s",
        network_latency=10, gpus_per_node=2, jitter=0.1,
    )  # fmt: skip
    given = kinds(plan(other))
    for name in (
        "CPU cores per node",
        "storage per node",
        "network per node",
        "latency between nodes",
        "jitter of a step",
    ):
        assert given[name] == "given"
    assert plan(other).cluster.local_ranks == 2

    latency = kinds(plan(Capacity(nodes="2", global_batch="32", measured=files, network_latency=10)))
    assert (latency["network per node"], latency["latency between nodes"]) == ("measured", "given")


def test_several_benches_give_the_time_by_batch_size(tmp_path: Path) -> None:
    files = (
        write(tmp_path / "16.json", bench(batch=16, seconds=1.0)),
        write(tmp_path / "64.json", bench(batch=64, seconds=2.0)),
    )
    found = plan(Capacity(nodes="1,2", gpus_per_node=1, global_batch="64", network="1 GB/s", measured=files))
    one, two = found.steps[64]
    assert (one.terms["compute"], two.terms["compute"]) == pytest.approx((2.0, 1 + 16 / 48))
    assert not any("in proportion" in note for note in found.notes)


def test_the_step_includes_what_the_loader_takes_from_it_but_not_waiting(tmp_path: Path) -> None:
    figures = bench(batch=16, seconds=1.0)
    for rate, waiting, seconds in ((8.0, 0.0, 2.0), (8.0, 0.5, 1.0), (20.0, 0.0, 1.0)):
        path = write(tmp_path / "b.json", figures | {"both": figures["both"] | {"rate": rate, "waiting": waiting}})
        found = plan(Capacity(nodes="1", gpus_per_node=1, global_batch="16", measured=(path,)))
        assert found.steps[16][0].terms["compute"] == pytest.approx(seconds)


def test_decoding_by_cores(tmp_path: Path) -> None:
    """On CPUs in proportion to the cores (160 images/s with 2); on a GPU, one core of each rank launches the step."""
    path = write(tmp_path / "b.json", bench())
    found = plan(Capacity(nodes="1", gpus_per_node=2, cores_per_node=16, network="1 GB/s", measured=(path,)))
    assert found.cluster.input.decode == pytest.approx(2 * 160 * 8 / 2)
    cpu = reference.h200().loader_cpu_seconds
    assert plan(Capacity(nodes="1", cores_per_node=16)).cluster.input.decode == pytest.approx(8 * (2 - 1) / cpu)
    assert plan(Capacity(nodes="1", cores_per_node=800)).cluster.input.decode == pytest.approx(8 * 18408.4)


def test_images_of_the_set(digits: Path) -> None:
    found = plan(Capacity(data=str(digits), nodes="1"))
    assert found.images == 1437
    stored = sum(file.stat().st_size for file in digits.rglob("*train*.tar"))
    assert found.cluster.input.image_bytes == pytest.approx(stored / 1437)
    assert kinds(found)["training images"] == "measured"
    assert found.cluster.workload.parameters < plan(Capacity(nodes="1")).cluster.workload.parameters  # 10 classes


def test_image_size_scales_the_time_of_the_device() -> None:
    small, large = (plan(Capacity(variant="b3", size=size, nodes="1")) for size in (112, 224))
    assert small.steps[4096][0].terms["compute"] == pytest.approx(large.steps[4096][0].terms["compute"] / 4)
    assert small.steps[4096][0].terms["launch"] == large.steps[4096][0].terms["launch"]
    assert any("224 pixels" in note for note in small.notes)


def test_the_latency_is_that_of_a_small_all_reduce_not_of_one_value(tmp_path: Path) -> None:
    """gloo divides only larger tensors among the ranks, which takes more messages."""
    path = cpu_doctor(tmp_path / "d.json", latency=1e-3)
    content = json.loads(path.read_text())
    content["network"]["all_reduce"].insert(0, {"bytes": 4096, "seconds": 2e-3, "bus_bandwidth": 1.0})
    for small, latency in ((2e-3, 2e-3), (None, 1e-3)):
        if small is None:
            del content["network"]["all_reduce"][0]
        files = write(tmp_path / "b.json", bench()), write(path, content)
        network = plan(Capacity(nodes="2", global_batch="32", measured=files)).cluster.network
        assert network.all_reduce(64, Topology(2, 1)) == pytest.approx(latency, rel=1e-3)


def test_a_doctor_of_gpus_on_several_nodes(tmp_path: Path) -> None:
    doctor = write(tmp_path / "doctor.json", healthy(4, local_ranks=2))
    found = plan(Capacity(variant="b3", nodes="1,4,8", measured=(doctor,)))
    assert found.cluster.local_ranks == 2
    names = kinds(found)
    assert names["all-reduce over 8 ranks"] == "measured"
    assert names["links of a GPU"] == "assumed"  # of collectives within a node


def test_a_doctor_of_gpus_on_one_node_measures_collectives_within_nodes_only(tmp_path: Path) -> None:
    doctor = write(tmp_path / "doctor.json", healthy(1, local_ranks=2))
    found = plan(Capacity(nodes="1,2", measured=(doctor,)))
    within = found.cluster.network.all_reduce(1 << 26, Topology(1, 2))
    assert within == pytest.approx(1e-3)
    assert found.cluster.network.all_reduce(1 << 26, Topology(2, 2)) == pytest.approx(1.5 * (1 << 26) / 50e9, rel=0.05)
    names = kinds(found)
    assert (names["all-reduce over 2 ranks"], names["network per node"]) == ("measured", "assumed")
    assert "links of a GPU" in names  # of collectives between nodes
    assert any("is of one host: the network between nodes is assumed" in note for note in found.notes)
    alone = plan(Capacity(nodes="1", measured=(doctor,)))
    assert not any("of one host" in note for note in alone.notes)
    given = plan(Capacity(nodes="1,2", measured=(doctor,), network="10 Gbit/s", gpu_network="1 GB/s"))
    assert (kinds(given)["network per node"], kinds(given)["links of a GPU"]) == ("given", "given")
    assert given.cluster.network.all_reduce(1 << 26, Topology(1, 2)) == pytest.approx((1 << 26) / 1e9, rel=0.01)


def test_an_all_reduce_of_one_rank_or_measured_twice_is_not_an_error(tmp_path: Path) -> None:
    content = json.loads(cpu_doctor(tmp_path / "d.json").read_text())
    content["network"]["all_reduce"] *= 2
    files = write(tmp_path / "b.json", bench()), write(tmp_path / "twice.json", content)
    assert plan(Capacity(nodes="2", global_batch="32", measured=files)).steps[32]
    one = content | {"nodes": content["nodes"][:1], "ranks": content["ranks"][:1]}
    files = files[0], write(tmp_path / "one.json", one)
    with pytest.raises(UserError, match="--network: neither given nor measured"):
        plan(Capacity(nodes="2", measured=files))


def test_notes_say_what_the_reference_does_not_measure() -> None:
    for variant, launch, alone in (("b0", True, False), ("b1", True, True), ("b3", False, False)):
        notes = plan(Capacity(variant=variant, nodes="1")).notes  # type: ignore[arg-type]
        assert any(note.startswith("only batch 256 was measured") for note in notes)
        assert any(f"was measured with fat_b3: that of fat_{variant} is" in note for note in notes) == launch
        assert any(f"of fat_{variant}, only the model alone was measured" in note for note in notes) == alone


def test_storage_of_more_nodes_than_measured_is_noted(tmp_path: Path) -> None:
    """Two ranks of 1 GB/s per node."""
    text = "storage was measured with 2 nodes at the same time: for 64 nodes, 128 GB/s in total are assumed; set"
    doctor = write(tmp_path / "d.json", healthy(2, local_ranks=2))
    for options, noted in (
        ({"nodes": "1,64"}, True),
        ({"nodes": "1,2"}, False),
        ({"nodes": "1,64", "storage_total": "20 GB/s"}, False),
        ({"nodes": "1,64", "storage": "1 GB/s"}, False),
    ):
        notes = plan(Capacity(variant="b3", measured=(doctor,), **options)).notes  # type: ignore[arg-type]
        assert any(note.startswith(text) for note in notes) == noted, options
    one = write(tmp_path / "one.json", healthy(1, local_ranks=2))
    notes = plan(Capacity(variant="b3", nodes="4", measured=(one,))).notes
    assert any(note.startswith("storage was measured with 1 node: for 4 nodes, 8 GB/s in total") for note in notes)


@pytest.mark.parametrize(
    ("engine", "ranks", "options", "text"),
    [
        ("DeepSpeed ZeRO-1, bf16", 8, {}, None),
        ("", 8, {}, None),  # written by an older version
        ("plain data parallel, bf16", 8, {}, "measured ZeRO 0, but ZeRO 1 is predicted; measure with 'pipeline "
         "bench SET --ranks 8 -- --zero 1 --global-batch 128'"),
        ("plain data parallel, bf16", 8, {"zero": 0}, None),
        ("DeepSpeed ZeRO-1, bf16", 8, {"cores_per_node": 64}, "measured a rank with 16 CPU cores, but one with 8 "
         "is predicted; "),
        ("DeepSpeed ZeRO-1, bf16", 1, {}, "measured with --ranks 1, and each of the 8 ranks of a node is assumed "
         "to have its 16 CPU cores"),
        ("DeepSpeed ZeRO-1, bf16", 1, {"cores_per_node": 128}, None),
    ],
)  # fmt: skip
def test_a_bench_of_another_configuration_is_noted(
    tmp_path: Path, engine: str, ranks: int, options: dict[str, Any], text: str | None
) -> None:
    figures = bench(gpu=True)
    figures["settings"] |= {"engine": engine, "ranks": ranks}
    figures["machine"] |= {"cores": 64, "rank_cores": 16}
    path = write(tmp_path / "b.json", figures)
    notes = [note for note in plan(Capacity(nodes="1,2", measured=(path,), **options)).notes if "b.json" in note]
    assert len(notes) == (text is not None), notes
    if text:
        assert f"b.json {text}" in notes[0]


def test_a_launch_as_long_as_the_step_is_noted(tmp_path: Path) -> None:
    for host, noted in ((0.95, True), (0.5, False)):
        figures = bench(gpu=True, batch=256)
        figures["model"] = figures["both"] = figures["model"] | {"host": host}
        notes = plan(Capacity(nodes="1", measured=(write(tmp_path / "b.json", figures),))).notes
        assert any("took as long as the step at batch 256" in note for note in notes) == noted


def test_gradients_are_ready_by_parts_if_the_bench_used_cuda_graphs(tmp_path: Path) -> None:
    ready = {}
    for mode in ("off", "cudagraphs: forward and backward of 6 parts"):
        figures = bench(gpu=True)
        figures["settings"]["compile"] = mode
        found = plan(Capacity(nodes="1", measured=(write(tmp_path / "b.json", figures),)))
        ready[mode] = found.cluster.workload.buckets[0].ready
    eager, graphs = ready.values()
    assert graphs > eager
    assert plan(Capacity(nodes="1")).cluster.workload.buckets[0].ready == graphs


def test_figures_derived_from_measurements(tmp_path: Path) -> None:
    figures = bench(gpu=True)
    figures["settings"]["ranks"] = 2
    figures["model"] = figures["model"] | {"host": 0.3, "times": [90.0, 110.0]}
    figures["both"] = figures["both"] | {"host": 0.2}
    doctor = json.loads(write(tmp_path / "d.json", healthy(2, local_ranks=2)).read_text())
    doctor["nodes"][1]["cores"] = 24
    files = write(tmp_path / "b.json", figures), tmp_path / "d.json"
    files[1].write_text(json.dumps(doctor))
    found = read_measured(files, "fat_b0")
    (_, measured), path_and_doctor = found.benches[0], found.doctor
    assert path_and_doctor is not None
    assert measured.launch_seconds == 0.2  # the queue was full in the other phase
    assert measured.jitter == pytest.approx(200**0.5 / 100)
    assert measured.rank_cores == 1
    bound = measured.model_copy(update={"machine": measured.machine.model_copy(update={"rank_cores": 16})})
    assert bound.rank_cores == 16  # recorded: `cores` are those of the NUMA node to which the rank is bound
    assert path_and_doctor[1].cores == 24
    assert path_and_doctor[1].storage == 2e9  # two ranks of 1 GB/s


def test_findings_of_the_doctor_are_noted(tmp_path: Path) -> None:
    for count, text in ((0, None), (1, "has 1 finding: "), (2, "has 2 findings: ")):
        content = json.loads(write(tmp_path / "d.json", healthy(2)).read_text()) | {"findings": [{}] * count}
        notes = plan(Capacity(nodes="1", measured=(write(tmp_path / "d.json", content),))).notes
        assert any(f"d.json {text}" in note for note in notes) == bool(text)


def test_the_loader_of_the_largest_batch_counts_in_any_order(tmp_path: Path) -> None:
    small, large = (write(tmp_path / f"{batch}.json", bench(batch=batch)) for batch in (16, 64))
    for measured in ((small, large), (large, small)):
        found = plan(Capacity(nodes="1", gpus_per_node=1, measured=measured))
        assert found.cluster.input.decode == pytest.approx(640)


@pytest.mark.parametrize(("gpus", "text"), [(1, "H200, 1 GPU per node"), (2, "H200, 2 GPUs per node")])
def test_the_title_counts(gpus: int, text: str) -> None:
    title = describe(plan(Capacity(nodes="1", gpus_per_node=gpus, epochs=gpus * 1000)))
    assert text in title
    assert f"{gpus},000 epochs of" in title


def test_the_latency_of_tcp_is_assumed_on_cpus(tmp_path: Path) -> None:
    path = write(tmp_path / "b.json", bench())
    found = plan(Capacity(nodes="2", gpus_per_node=1, network="1 GB/s", measured=(path,)))
    assert next(figure for figure in found.figures if "latency" in figure.name).source == "TCP"
    assert found.cluster.network.all_reduce(0, Topology(2, 1)) == pytest.approx(2 * reference.TCP_LATENCY)


# -- errors ------------------------------------------------------------------------------------------------------------


def without(content: dict[str, Any], *path: str) -> dict[str, Any]:
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1])
    return content


FILES = {
    "not JSON": ("{", "not valid JSON; expected a file of 'pipeline bench"),
    "a list": ("[]", "a list, not an object"),
    "of another command": ('{"steps": 1}', "neither figures of bench nor of doctor"),
    "no rate": (json.dumps(without(bench(), "model", "rate")), "model.rate: Field required"),
    "no phase": (json.dumps(without(bench(), "both")), "both: Field required; write it again with 'pipeline bench"),
    "negative": (json.dumps(bench() | {"loader": {"rate": -1.0, "cpu": 0, "waiting": 0}}), "loader.rate: Input should"),
    "too small": (json.dumps(bench() | {"both": bench()["both"] | {"rate": 1e-300}}), "both.rate: Input should be gre"),
    "too large": (json.dumps(bench() | {"both": bench()["both"] | {"rate": 1e300}}), "both.rate: Input should be less"),
    "no network": (json.dumps({"nodes": [], "ranks": []}), "write it again with 'pipeline doctor"),
    "another model": (json.dumps(bench(model="fat_b2")), "measured fat_b2, not fat_b0; measure with 'pipeline bench"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_one_line_errors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[name]
    path = tmp_path / "file.json"
    path.write_text(content)
    assert main(["capacity", "--measured", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --measured {path}: ")
    assert message in error
    assert error.count("\n") == 1


OPTIONS = {
    "--nodes 1,,2": "an empty entry is not a whole number from 1 to 10,000",
    "--nodes 20000": "20000 is not a whole number from 1 to 10,000",
    "--global-batch 1e3": "1e3 is not a whole number",
    "--network 400": "expected a rate such as '400 Gbit/s' or '5 GB/s'",
    "--storage 5Gb": "expected a rate",
    "--min-efficiency 0.5": "expected a number above 0.5 to 1",
    "--sync-bn groups": "expected auto, on, off or group:N",
    "--model timm/resnet50": "was not measured; measure it with 'pipeline bench SET --json bench.json -- --model timm",
    "--variant b0 --model fat_b1": "are different models",
    "--measured missing.json": "no such file",
    "--measured .": "is a folder",
    "--data missing": "no such shard set",
    "--data https://host/set": "is a URL",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_wrong_options_are_one_line_errors(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", *options.split()]) == 2
    error = capsys.readouterr().err
    assert OPTIONS[options] in error
    assert error.count("\n") == 1


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    gpu, cpu = write(tmp_path / "gpu.json", bench(gpu=True)), write(tmp_path / "cpu.json", bench())
    doctor, other = cpu_doctor(tmp_path / "d.json"), cpu_doctor(tmp_path / "e.json")
    compiled = bench()
    compiled["settings"]["compile"] = "default: in the forward pass"
    compiled_file = write(tmp_path / "compiled.json", compiled)
    one_host = cpu_doctor(tmp_path / "f.json", hosts=1)
    one_rank = write(tmp_path / "one.json", json.loads(doctor.read_text()) | {"network": None})
    for measured, message in (
        ((gpu, doctor), "its ranks have CPUs, but those of bench.json GPUs"),
        ((doctor,), "its ranks have CPUs, but those of the reference"),
        ((cpu, compiled_file), "measured with --compile default, but .* with off; use files of one mode"),
        ((gpu, cpu), "use files of one device and size"),
        ((cpu, doctor, other), "are both of 'pipeline doctor'; use the one with more nodes"),
        ((cpu,), "--network: neither given nor measured"),
        ((cpu, one_rank), "--network: neither given nor measured"),
        ((cpu, one_host), "'pipeline doctor --json doctor.json' on several nodes, or use --network"),
    ):
        with pytest.raises(UserError, match=message):
            plan(Capacity(measured=measured))
    with pytest.raises(UserError, match="on a node, with 4 processes, or use --network"):
        plan(Capacity(nodes="1", gpus_per_node=4, measured=(cpu,)))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400 Gbit/s", 50e9),
        ("10gbit", 1.25e9),
        ("2.5 GB/s", 2.5e9),
        ("100MB/s", 1e8),
        ("1 Tbps", None),
        ("8kbit/s", 1e3),
    ],
)
def test_rates(text: str, rate: float | None) -> None:
    if rate is None:
        with pytest.raises(UserError, match="--network 1 Tbps: expected a rate"):
            parse_rate("--network", text)
    else:
        assert parse_rate("--network", text) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("sync_bn", "possible", "reason"),
    [
        ("on", (2, 3), "--sync-bn on: requires several ranks"),
        ("group:2", (2,), "--sync-bn group:2: 2 does not divide the world size 3; the nearest that do: 1 and 3"),
        ("auto", (1, 2, 3), ""),
    ],
)
def test_groups_of_batch_norm_that_training_rejects(sync_bn: str, possible: tuple[int, ...], reason: str) -> None:
    found = plan(Capacity(nodes="1,2,3", gpus_per_node=1, global_batch="768", sync_bn=sync_bn))
    assert tuple(step.nodes for step in found.steps[768]) == possible
    assert any(reason in text for text in found.impossible[768].values()) == bool(reason)


def test_fewer_images_than_a_global_batch(digits: Path) -> None:
    found = plan(Capacity(data=str(digits), nodes="1", global_batch="1024,2048"))
    assert found.steps[1024]
    assert not found.steps[2048]
    assert "1437 training images are fewer than one global batch of 2048" in found.impossible[2048][1]


# -- output ------------------------------------------------------------------------------------------------------------


def shown(found: Plan, width: int) -> str:
    text = io.StringIO()
    show(found, Console(file=text, width=width, highlight=False))
    return text.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_into_the_terminal(width: int, tmp_path: Path) -> None:
    files = write(tmp_path / "b.json", bench(seconds=100.0)), cpu_doctor(tmp_path / "d.json", latency=10.0)
    slow = Capacity(nodes="1,2,64", measured=files, sync_bn="on", zero=0)
    for options in (Capacity(variant="b3", nodes="1,2,3,10000"), slow):
        lines = shown(plan(options), width).splitlines()
        assert max(map(len, lines)) <= width
        rows = [line.split() for line in lines if line.strip()[:2] in ("1 ", "64")]
        assert rows
        for row in rows:  # numbers are not cut
            assert "…" not in "".join(row)


def test_tables_say_what_limits_and_how_many_nodes_are_useful() -> None:
    text = shown(plan(Capacity(variant="b3", nodes="1,2,3,64", global_batch="1024")), 120)
    assert "global batch 1,024: 375,300 steps" in text
    assert "3 nodes: not possible (world size 24 does not divide the global batch of 1024 into pairs" in text
    assert "useful: up to 2 nodes (each doubling gives at least 1.4 x images/s)" in text
    assert "launch" in text
    assert "reference: NVIDIA H200, benchmarks/results/gpu.json" in text
    none = shown(plan(Capacity(nodes="3", global_batch="1000")), 120)
    assert "useful: none of these numbers of nodes is possible" in none


def test_json_has_every_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--nodes", "1,3,8", "--global-batch", "1024", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(json.dumps(to_json(plan(Capacity(nodes="1,3,8", global_batch="1024")))))
    assert set(content) == {
        "model", "size", "epochs", "images", "device", "ranks_per_node", "zero", "sync_bn", "min_efficiency", "figures",
        "notes", "global_batches",
    }  # fmt: skip
    (batch,) = content["global_batches"]
    assert [entry["nodes"] for entry in batch["impossible"]] == [3]
    first, last = batch["predictions"]
    assert set(first) == {
        "nodes", "ranks", "rank_batch", "images_per_second", "step_seconds", "limit", "terms", "all_reduce_seconds",
        "efficiency", "hours", "node_hours",
    }  # fmt: skip
    assert set(first["terms"]) == {
        "decode", "storage", "compute", "launch", "gradient all-reduce", "BatchNorm collectives",
    }  # fmt: skip
    assert first["efficiency"] == 1
    assert last["node_hours"] == pytest.approx(8 * last["hours"])
    assert last["efficiency"] == pytest.approx(last["images_per_second"] / 8 / first["images_per_second"])
    out = tmp_path / "capacity.json"
    assert main(["capacity", "--nodes", "1,3,8", "--global-batch", "1024", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == content
    assert "useful" in capsys.readouterr().out


# -- documentation -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_is_the_output_of_the_command() -> None:
    page = (ROOT / "docs" / "capacity.md").read_text()
    example = page.partition("```text\n")[2].partition("```")[0]
    text = shown(plan(Capacity(variant="b3", nodes="1,2,4,8,16,64")), 120)
    assert [line.rstrip() for line in text.splitlines()] == example.splitlines()


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3"])
def test_the_useful_nodes_in_the_documentation_are_predicted(variant: Variant) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    (row,) = re.findall(rf"^\| {variant.upper()} \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    fast, slow = (plan(Capacity(variant=variant, network=network)) for network in (None, "10 Gbit/s"))
    assert tuple(map(int, row)) == (fast.useful(1024), fast.useful(4096), slow.useful(4096))
