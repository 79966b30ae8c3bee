"""Choose the network of predictions from options, the measurements of `pipeline doctor`, and references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.capacity import reference
from launch.capacity.costs.network import LinkNetwork, MeasuredNetwork, Network, SplitNetwork, Topology
from launch.capacity.figures import Figures, rate_text
from launch.capacity.measured import Doctor, MeasuredAllReduces
from shards.redact import printable

if TYPE_CHECKING:
    from launch.capacity.options import Capacity


@dataclass(frozen=True, kw_only=True)
class NetworkSources:
    """What the network is chosen from."""

    options: Capacity
    doctor: Doctor | None
    doctor_path: Path | None
    figures: Figures
    """The figures that are used are added to them."""
    local_ranks: int
    on_gpu: bool

    def network(self) -> Network:
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
            self.figures.notes.append(
                f"{printable(self.doctor_path)} is of one host: the network between nodes is assumed; run "
                "'pipeline doctor' on several nodes"
            )
        return SplitNetwork(within=within, between=self._links())

    def _all_reduces(self, doctor: Doctor, found: MeasuredAllReduces) -> MeasuredNetwork:
        hosts, ranks = len(doctor.nodes), len(doctor.ranks)
        sizes = ", ".join(f"{entry.bytes >> 10:,} KiB {1e3 * entry.seconds:.3g} ms" for entry in found.all_reduce)
        self.figures.add(
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
        between = self.figures.rate("--network", options.network, "network per node")
        if between is None and self.doctor and (between := self.doctor.message_bandwidth) is not None:
            self.figures.add("network per node", rate_text(between), "measured", self.doctor_path)
        if between is None:
            between = reference.NETWORK
            if nodes > 1:
                self.figures.add("network per node", rate_text(between), "assumed", "an adapter of 400 Gbit/s")
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
            self.figures.add("latency between nodes", f"{1e6 * latency:,.1f} us", kind, source)  # type: ignore[arg-type]
        if self.on_gpu:
            return replace(self._gpu_links(), latency=latency, bandwidth=between)
        return LinkNetwork(
            latency=latency, bandwidth=between, local_latency=latency, local_bandwidth=between, algorithm="ring"
        )

    def _gpu_links(self) -> LinkNetwork:
        """Return the links between the GPUs of a node; the network between nodes is to be replaced."""
        within = self.figures.rate("--gpu-network", self.options.gpu_network, "links of a GPU")
        if within is None:
            within = reference.GPU_NETWORK
            if self.local_ranks > 1:
                self.figures.add(
                    "links of a GPU", rate_text(within), "assumed", "NVLink, NVIDIA's data sheet of the H200"
                )
        return LinkNetwork(
            latency=reference.GPU_LATENCY,
            bandwidth=within,
            local_latency=reference.GPU_LATENCY,
            local_bandwidth=within,
            base_latency=reference.BASE_LATENCY,
        )
