"""Choose the figures of predictions from options, measurements and references, and record their sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launch.bench.verdict import HOST_BOUND
from launch.capacity import reference
from launch.capacity.bandwidth import parse_rate
from launch.capacity.costs.compute import StepTimes
from launch.capacity.costs.network import LinkNetwork, MeasuredNetwork, Network, SplitNetwork, Topology
from launch.capacity.costs.step import Cluster, Input
from launch.capacity.costs.workload import Workload
from launch.capacity.errors import CapacityError
from launch.capacity.figures import Figure, Kind
from launch.capacity.measured import Doctor, Measured, MeasuredAllReduces
from launch.config.engine import ParallelConfig
from launch.engine.execution import zero_and_precision
from launch.engine.sync_batchnorm import syncs_over_ranks
from pipeline.storage.remote.url import is_remote
from shards.format.dataset import ShardSet
from shards.redact import printable, redact

if TYPE_CHECKING:
    from launch.capacity.options import Capacity

LAUNCHING_CORES = 1
"""CPU cores per GPU that launch the training's kernels and do not decode."""


class Sources:
    """Chooses each figure: an option before a measurement, a measurement before a reference or an assumption."""

    def __init__(self, options: Capacity, measured: Measured) -> None:
        self.options, self.measured = options, measured
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.doctor_path = measured.doctor[0] if measured.doctor else None
        self.doctor = measured.doctor[1] if measured.doctor else None
        self.on_gpu = all(bench.on_gpu for _, bench in measured.benches)
        self.torch_device = torch.device("cuda" if self.on_gpu else "cpu")
        self.local_ranks = options.gpus_per_node or (self.doctor.local_ranks if self.doctor else 8)
        self._check()
        self.images, self.image_bytes, self.classes = self._data()
        self.device = ""

    def _check(self) -> None:
        spec, reference_models = self.options.spec, reference.h200().images_per_second
        if not self.measured.benches and str(spec) not in reference_models:
            raise CapacityError(
                f"--model {spec}: was not measured; measure it with 'pipeline bench SET --json bench.json -- --model "
                f"{spec}', and add --measured bench.json"
            )
        if self.doctor and self.doctor.on_gpu != self.on_gpu:
            kinds = ("GPUs", "CPUs") if self.doctor.on_gpu else ("CPUs", "GPUs")
            of = "bench.json" if self.measured.benches else "the reference (add a bench.json of a CPU)"
            raise CapacityError(
                f"--measured {printable(self.doctor_path)}: its ranks have {kinds[0]}, but those of {of} {kinds[1]}; "
                "measure both on the machines of the training"
            )
        nodes = max(self.options.node_counts)
        measured = (
            self.doctor is not None and self.doctor.network is not None and min(nodes, 2) <= len(self.doctor.nodes)
        )
        if not self.on_gpu and not measured and self.options.network is None and nodes * self.local_ranks > 1:
            where = "several nodes" if nodes > 1 else f"a node, with {self.local_ranks} processes"
            raise CapacityError(
                "--network: neither given nor measured; without GPUs there is no reference for it, so measure it "
                f"with 'pipeline doctor --json doctor.json' on {where}, or use --network"
            )

        if self.doctor and self.doctor.findings:
            count = len(self.doctor.findings)
            self.notes.append(
                f"{printable(self.doctor_path)} has {count} finding{'s' if count != 1 else ''}: the predictions are of "
                "a cluster with these faults; repair or exclude the hosts, and measure again"
            )

    def cluster(self) -> Cluster:
        options = self.options
        ranks = self.local_ranks * max(options.node_counts)
        zero, _ = zero_and_precision(ParallelConfig(zero=options.zero), self.torch_device, ranks=ranks)
        modes = {bench.settings.compile_mode for _, bench in self.measured.benches}
        graphs = self.on_gpu and modes <= {"", "cudagraphs"}  # the default of training on GPUs
        return Cluster(
            workload=Workload.of(options.spec, size=options.size, classes=self.classes, graphs=graphs),
            local_ranks=self.local_ranks,
            times=self._times(),
            input=self._input(),
            network=self._network(),
            zero=zero,
            sync_bn=self._sync_bn(ranks),
            overlaps=self.on_gpu,
            jitter=self._jitter(),
            micro_batch=options.micro_batch,
        )

    def _note(self, name: str, text: str, kind: Kind, source: object) -> None:
        self.figures.append(Figure(name, text, kind, printable(redact(str(source)))))

    # -- data and model ------------------------------------------------------------------------------------------------

    def _data(self) -> tuple[int, float, int]:
        """Return the training images, their bytes and the classes."""
        location = self.options.data
        if location is None:
            images, size, classes = reference.IMAGENET_IMAGES, reference.IMAGENET_BYTES, reference.CLASSES
            kind: Kind = "assumed"
            source = "ImageNet-1K"
        else:
            if is_remote(location):
                raise CapacityError(
                    f"--data {redact(location)}: is a URL; use a folder with a copy of its dataset.json"
                )
            dataset = ShardSet(Path(location))
            split = dataset.split("train")
            images, classes, kind, source = split.samples, len(dataset.manifest.classes), "measured", location
            stored = split.beton.bytes if split.beton else sum(shard.bytes for shard in split.shards)
            size = stored / images
        self._note("training images", f"{images:,} of {size / 1e3:,.0f} kB", kind, source)
        return images, size, classes

    def _times(self) -> StepTimes:
        known = reference.h200()
        if not self.measured.benches:
            rate = known.images_per_second[str(self.options.spec)]
            self.device = known.device
            self._note(
                "training step", f"{rate:,.0f} images/s at batch {known.batch}", "reference", reference.MEASURED_IN
            )
            self._note("launching a step", f"{1e3 * known.launch_seconds:.1f} ms", "reference", reference.MEASURED_IN)
            if str(self.options.spec) != known.launch_model:
                self.notes.append(
                    f"the time of launching a step was measured with {known.launch_model}: that of "
                    f"{self.options.spec} is assumed to be as long, but it has fewer layers; add a bench.json"
                )
            times = StepTimes.of([(known.batch, known.batch / rate)], launch=known.launch_seconds)
            return self._checked(times, known.size)
        points, launches = [], []
        for path, bench in self.measured.benches:
            batch, seconds = bench.settings.batch, bench.step_seconds
            points.append((batch, seconds))
            launches.append(bench.launch_seconds)
            self._note("training step", f"{batch / seconds:,.1f} images/s at batch {batch}", "measured", path)
        launch = min(launches)
        if launch:
            self._note("launching a step", f"{1e3 * launch:.1f} ms", "measured", "bench.json")
        first = self.measured.benches[0][1]
        self.device = printable(first.machine.device)
        times = StepTimes.of(points, launch=launch)
        batch, seconds = times.points[0]
        if len(times.points) == 1 and launch >= HOST_BOUND * seconds:
            self.notes.append(
                f"launching a step took as long as the step at batch {batch}, perhaps because the queue of the GPU was "
                "full: smaller batches may be faster than predicted"
            )
        return self._checked(times, first.settings.size)

    def _checked(self, times: StepTimes, measured: int) -> StepTimes:
        """Return the times for the size of the images; note what was not measured.

        Args:
            measured: size at which they were measured.
        """
        size = self.options.size
        if len(times.points) == 1:
            self.notes.append(
                f"only batch {times.points[0][0]} was measured: the time of other batches is assumed to be in "
                "proportion; add a bench.json with the smallest batch per rank"
            )
        if size != measured:
            self.notes.append(
                f"steps were measured at {measured} pixels: those at {size} are assumed to take a time in proportion "
                "to the number of pixels"
            )
        return times.at_size(size, measured)

    def _jitter(self) -> float:
        if self.options.jitter is not None:
            value, kind, source = self.options.jitter, "given", "--jitter"
        elif not self.measured.benches:
            value, kind, source = reference.h200().jitter, "reference", reference.MEASURED_IN
        else:
            value, kind, source = max(bench.jitter for _, bench in self.measured.benches), "measured", "bench.json"
        if not value:  # not measured on CPUs
            return 0.0
        self._note("jitter of a step", f"{value:.1%}", kind, source)  # type: ignore[arg-type]
        return value

    def _sync_bn(self, ranks: int) -> int | None:
        chosen = ParallelConfig(sync_bn=self.options.sync_bn).sync_bn
        if not syncs_over_ranks(chosen, ranks, self.torch_device):
            return None
        return int(chosen.removeprefix("group:")) if chosen.startswith("group:") else 0

    # -- input ---------------------------------------------------------------------------------------------------------

    def _input(self) -> Input:
        return Input(
            decode=self._decode(),
            image_bytes=self.image_bytes,
            storage=self._storage(),
            storage_total=self._rate("--storage-total", self.options.storage_total, "storage of all nodes"),
        )

    def _cores(self, per_rank: float, kind: Kind, source: object) -> float:
        """Return the CPU cores of a rank.

        Args:
            per_rank: number that is used if there is no other.
        """
        if self.options.cores_per_node is not None:
            cores, kind, source = float(self.options.cores_per_node), "given", "--cores-per-node"
        elif self.doctor is not None:
            cores, kind, source = float(self.doctor.cores), "measured", self.doctor_path
        else:
            cores = per_rank * self.local_ranks
        self._note("CPU cores per node", f"{cores:g}", kind, source)
        return cores / self.local_ranks

    def _decode(self) -> float:
        """Return the images/s that a node prepares.

        On a GPU, the decoder of the GPU and the CPU time per image are limits. On CPUs, the rate of the loader alone is
        in proportion to the cores: what it takes from the training is part of the step's time.
        """
        if self.measured.benches:
            path, bench = max(self.measured.benches, key=lambda entry: (entry[1].settings.batch, entry[1].loader.rate))
            rate, cpu, kind, source = bench.loader.rate, bench.decode_cpu, "measured", str(path)
            own_cores, on_device = bench.rank_cores, "on the GPU" in bench.settings.loader
        else:
            known = reference.h200()
            rate, cpu = known.loader_images_per_second, known.loader_cpu_seconds
            kind, source = "reference", reference.MEASURED_IN
            own_cores, on_device = float(known.cores), True
        cores = self._cores(own_cores, kind, source)  # type: ignore[arg-type]
        per_rank = rate if on_device else rate * cores / own_cores
        if self.on_gpu and cpu:
            per_rank = min(per_rank, max(cores - LAUNCHING_CORES, cores / 2) / cpu)
        self._note("decoding per node", f"{per_rank * self.local_ranks:,.0f} images/s", kind, source)  # type: ignore[arg-type]
        return per_rank * self.local_ranks

    def _storage(self) -> float | None:
        given = self._rate("--storage", self.options.storage, "storage per node")
        if given is not None or self.doctor is None or self.doctor.storage is None:
            if given is None and self.options.storage_total is None:
                self.notes.append(
                    "storage was neither measured nor given, and is no limit here: 'pipeline doctor SET' measures it"
                )
            return given
        self._note("storage per node", _rate_text(self.doctor.storage), "measured", self.doctor_path)
        return self.doctor.storage

    def _rate(self, option: str, text: str | None, name: str) -> float | None:
        if text is None:
            return None
        value = parse_rate(option, text)
        self._note(name, _rate_text(value), "given", option)
        return value

    # -- network -------------------------------------------------------------------------------------------------------

    def _network(self) -> Network:
        """Return the network that was measured, unless an option sets it.

        On GPUs, a measurement over several nodes is not used within a node, and one within a node not between nodes.
        """
        options, doctor = self.options, self.doctor
        given = options.network is not None or options.network_latency is not None
        several_nodes = doctor is not None and len(doctor.nodes) > 1
        if (
            doctor is None
            or doctor.all_reduces is None
            or (given and (several_nodes or not self.on_gpu))
            or (not several_nodes and options.gpu_network is not None)
        ):
            return self._links()
        if not self.on_gpu:
            return self._all_reduces(doctor, doctor.all_reduces)
        if several_nodes:
            between = self._all_reduces(doctor, doctor.all_reduces)
            return SplitNetwork(within=self._gpu_links(), between=between)
        within = self._all_reduces(doctor, doctor.all_reduces)
        if max(options.node_counts) == 1:
            return within
        if options.network is None:
            self.notes.append(
                f"{printable(self.doctor_path)} is of one host: the network between nodes is assumed; run "
                "'pipeline doctor' on several nodes"
            )
        return SplitNetwork(within=within, between=self._links())

    def _all_reduces(self, doctor: Doctor, found: MeasuredAllReduces) -> MeasuredNetwork:
        hosts, ranks = len(doctor.nodes), len(doctor.ranks)
        sizes = ", ".join(f"{entry.bytes >> 10:,} KiB {1e3 * entry.seconds:.3g} ms" for entry in found.all_reduce)
        self._note(
            f"all-reduce over {ranks} ranks",
            f"8 bytes {1e3 * found.latency:.3g} ms{', ' if sizes else ''}{sizes}",
            "measured",
            self.doctor_path,
        )
        return MeasuredNetwork(
            measured=Topology(hosts, max(1, ranks // hosts)),
            latency=found.small_all_reduce,
            points=tuple(sorted({entry.bytes: entry.seconds for entry in found.all_reduce}.items())),
            message_latency=doctor.message_latency or reference.NETWORK_LATENCY,
            algorithm="tree" if self.on_gpu else "ring",
        )

    def _links(self) -> LinkNetwork:
        options, nodes = self.options, max(self.options.node_counts)
        between = self._rate("--network", options.network, "network per node")
        if between is None and self.doctor and (between := self.doctor.message_bandwidth) is not None:
            self._note("network per node", _rate_text(between), "measured", self.doctor_path)
        if between is None:
            between = reference.NETWORK
            if nodes > 1:
                self._note("network per node", _rate_text(between), "assumed", "an adapter of 400 Gbit/s")
        measured = self.doctor.message_latency if self.doctor else None
        if options.network_latency is not None:
            latency, kind, source = options.network_latency / 1e6, "given", "--network-latency"
        elif measured is not None:
            latency, kind, source = measured, "measured", str(self.doctor_path)
        elif self.on_gpu:
            latency, kind, source = reference.NETWORK_LATENCY, "assumed", "NCCL's src/graph/tuning.cc"
        else:
            latency, kind, source = reference.TCP_LATENCY, "assumed", "TCP"
        if nodes > 1 or (not self.on_gpu and self.local_ranks > 1):
            self._note("latency between nodes", f"{1e6 * latency:,.1f} us", kind, source)  # type: ignore[arg-type]
        if self.on_gpu:
            return replace(self._gpu_links(), latency=latency, bandwidth=between)
        return LinkNetwork(
            latency=latency, bandwidth=between, local_latency=latency, local_bandwidth=between, algorithm="ring"
        )

    def _gpu_links(self) -> LinkNetwork:
        """Return the links between the GPUs of a node; the network between nodes is to be replaced."""
        within = self._rate("--gpu-network", self.options.gpu_network, "links of a GPU")
        if within is None:
            within = reference.GPU_NETWORK
            if self.local_ranks > 1:
                self._note("links of a GPU", _rate_text(within), "assumed", "NVLink, NVIDIA's data sheet of the H200")
        return LinkNetwork(
            latency=reference.GPU_LATENCY,
            bandwidth=within,
            local_latency=reference.GPU_LATENCY,
            local_bandwidth=within,
            base_latency=reference.BASE_LATENCY,
        )


def _rate_text(rate: float) -> str:
    return f"{rate / 1e9:,.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:,.3g} MB/s"
