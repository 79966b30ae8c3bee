"""Choose the figures of predictions from options, measurements and references, and record their sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launch.bench.verdict import HOST_BOUND
from launch.capacity import reference
from launch.capacity.costs.compute import StepTimes
from launch.capacity.costs.step import Cluster, Input
from launch.capacity.costs.workload import Workload
from launch.capacity.errors import CapacityError
from launch.capacity.figures import Figures, Kind, rate_text
from launch.capacity.measured import Measured
from launch.capacity.measured_configuration import differences
from launch.capacity.network_sources import NetworkSources
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
        self.figures = Figures()
        self.doctor_path = measured.doctor[0] if measured.doctor else None
        self.doctor = measured.doctor[1] if measured.doctor else None
        self.on_gpu = all(bench.on_gpu for _, bench in measured.benches)
        self.torch_device = torch.device("cuda" if self.on_gpu else "cpu")
        self.local_ranks = options.gpus_per_node or (self.doctor.local_ranks if self.doctor else 8)
        self._check()
        self.images, self.image_bytes, self.classes = self._data()
        self.device = ""
        self.rank_cores = 0.0

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
            self.figures.notes.append(
                f"{printable(self.doctor_path)} has {count} finding{'s' if count != 1 else ''}: the predictions are of "
                "a cluster with these faults; repair or exclude the hosts, and measure again"
            )

    def cluster(self) -> Cluster:
        options = self.options
        ranks = self.local_ranks * max(options.node_counts)
        zero, _ = zero_and_precision(ParallelConfig(zero=options.zero), self.torch_device, ranks=ranks)
        modes = {bench.settings.compile_mode for _, bench in self.measured.benches}
        graphs = self.on_gpu and modes <= {"", "cudagraphs"}  # the default of training on GPUs
        cluster = Cluster(
            workload=Workload.of(options.spec, size=options.size, classes=self.classes, graphs=graphs),
            local_ranks=self.local_ranks,
            times=self._times(),
            input=self._input(),
            network=NetworkSources(
                options=options,
                doctor=self.doctor,
                doctor_path=self.doctor_path,
                figures=self.figures,
                local_ranks=self.local_ranks,
                on_gpu=self.on_gpu,
            ).network(),
            zero=zero,
            sync_bn=self._sync_bn(ranks),
            overlaps=self.on_gpu,
            jitter=self._jitter(),
            micro_batch=options.micro_batch,
        )
        self.figures.notes.extend(
            differences(
                self.measured.benches,
                zero=zero,
                local_ranks=self.local_ranks,
                rank_cores=self.rank_cores,
                cores_known=options.cores_per_node is not None or self.doctor is not None,
            )
        )
        return cluster

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
        self.figures.add("training images", f"{images:,} of {size / 1e3:,.0f} kB", kind, source)
        return images, size, classes

    def _times(self) -> StepTimes:
        known = reference.h200()
        if not self.measured.benches:
            model = str(self.options.spec)
            rate = known.step_rate(model)
            self.device = known.device
            self.figures.add(
                "training step", f"{rate:,.0f} images/s at batch {known.batch}", "reference", reference.MEASURED_IN
            )
            self.figures.add(
                "launching a step", f"{1e3 * known.launch_seconds:.1f} ms", "reference", reference.MEASURED_IN
            )
            if model not in known.training_images_per_second:
                self.figures.notes.append(
                    f"of {model}, only the model alone was measured: in training, the kernels of the loader make its "
                    "step longer; add a bench.json"
                )
            if model != known.launch_model:
                self.figures.notes.append(
                    f"the time of launching a step was measured with {known.launch_model}: that of {model} is assumed "
                    "to be as long, but it has fewer layers; add a bench.json"
                )
            times = StepTimes.of([(known.batch, known.batch / rate)], launch=known.launch_seconds)
            return self._checked(times, known.size)
        points, launches = [], []
        for path, bench in self.measured.benches:
            batch, seconds = bench.settings.batch, bench.step_seconds
            points.append((batch, seconds))
            launches.append(bench.launch_seconds)
            self.figures.add("training step", f"{batch / seconds:,.1f} images/s at batch {batch}", "measured", path)
        launch = min(launches)
        if launch:
            self.figures.add("launching a step", f"{1e3 * launch:.1f} ms", "measured", "bench.json")
        first = self.measured.benches[0][1]
        self.device = printable(first.machine.device)
        times = StepTimes.of(points, launch=launch)
        batch, seconds = times.points[0]
        if len(times.points) == 1 and launch >= HOST_BOUND * seconds:
            self.figures.notes.append(
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
            self.figures.notes.append(
                f"only batch {times.points[0][0]} was measured: the time of other batches is assumed to be in "
                "proportion; add a bench.json with the smallest batch per rank"
            )
        if size != measured:
            self.figures.notes.append(
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
        self.figures.add("jitter of a step", f"{value:.1%}", kind, source)  # type: ignore[arg-type]
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
            storage_total=self.figures.rate("--storage-total", self.options.storage_total, "storage of all nodes"),
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
        self.figures.add("CPU cores per node", f"{cores:g}", kind, source)
        self.rank_cores = cores / self.local_ranks
        return self.rank_cores

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
        self.figures.add("decoding per node", f"{per_rank * self.local_ranks:,.0f} images/s", kind, source)  # type: ignore[arg-type]
        return per_rank * self.local_ranks

    def _storage(self) -> float | None:
        given = self.figures.rate("--storage", self.options.storage, "storage per node")
        if given is not None or self.doctor is None or self.doctor.storage is None:
            if given is None and self.options.storage_total is None:
                self.figures.notes.append(
                    "storage was neither measured nor given, and is no limit here: 'pipeline doctor SET' measures it"
                )
            return given
        rate, hosts, nodes = self.doctor.storage, len(self.doctor.nodes), max(self.options.node_counts)
        self.figures.add("storage per node", rate_text(rate), "measured", self.doctor_path)
        if nodes > hosts and self.options.storage_total is None:
            at_once = f"{hosts} nodes at the same time" if hosts > 1 else "1 node"
            self.figures.notes.append(
                f"storage was measured with {at_once}: for {nodes:,} nodes, {rate_text(nodes * rate)} in total are "
                "assumed; set --storage-total to the rate of a shared file system"
            )
        return rate
