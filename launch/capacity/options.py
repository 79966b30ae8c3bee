"""`pipeline capacity`: its options, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from launch.capacity.errors import CapacityError
from launch.models.specification import ModelSpec, Variant
from shards.files.output import check_output, is_standard_output
from shards.option_help import default
from shards.ranges import MAX_BATCH, Batch, ModelSide, check_ranges
from shards.redact import printable

MAX_NODES = 10_000


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Predict images/s and hours of a training on several numbers of nodes, what limits it, and how many are useful.

    Nothing is measured: the figures are those of --measured and of the options, else those of an H200 and assumptions,
    which the output lists. Example: pipeline capacity --variant b3 --nodes 1,2,4,8 --measured bench.json doctor.json
    """

    variant: Annotated[Variant | None, default("b0")] = None
    """FAT variant."""
    model: Annotated[str | None, default("FAT, see --variant")] = None
    """Another model: timm/NAME or package.module:function. It needs a bench.json."""
    nodes: str = "1,2,4,8,16,32,64"
    """Numbers of nodes, separated by commas."""
    gpus_per_node: Annotated[
        Annotated[int, Interval(ge=1, le=1024)] | None, default("the ranks per host in doctor.json, else 8")
    ] = None
    """GPUs per node, with one rank each; on CPUs, ranks per node."""
    global_batch: str = "1024,4096"
    """Images per optimizer step, over all ranks; several numbers are separated by commas."""
    micro_batch: Annotated[Batch | None, default("all images of the rank in one forward pass")] = None
    """Images per forward pass of a rank; gradients are accumulated over the micro-batches of a step."""
    size: ModelSide = 224
    """Height and width of the images in pixels."""
    epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300
    """Epochs of the training."""
    zero: Literal["auto", 0, 1, 2] = "auto"
    """DeepSpeed ZeRO stage, as in training; auto = 1 on several GPUs, else 0."""
    sync_bn: str = "auto"
    """Ranks over which BatchNorm statistics are computed, as in training: auto, on, off or group:N."""
    measured: tuple[Path, ...] = ()
    """JSON files of 'pipeline bench' (several of them with different batch sizes give the time of a step by batch size)
    and of 'pipeline doctor' (network, storage and cores; use the file of a job on several nodes)."""
    data: Annotated[str | None, default("ImageNet-1K")] = None
    """Folder of a shard set, for the number of training images and their bytes."""
    cores_per_node: Annotated[Annotated[int, Interval(ge=1, le=65535)] | None, default("those of the measurements")] = (
        None
    )
    """CPU cores per node."""
    storage: Annotated[str | None, default("that of doctor.json, else not a limit")] = None
    """Rate at which a node reads shards, such as '5 GB/s'."""
    storage_total: Annotated[str | None, default("not a limit")] = None
    """Rate at which all nodes together read shards from a shared file system, such as '80 GB/s'."""
    network: Annotated[str | None, default("that of doctor.json, else 400 Gbit/s")] = None
    """Rate of the network of a node, in each direction, such as '400 Gbit/s'."""
    network_latency: Annotated[
        Annotated[float, Interval(ge=0, le=10_000_000)] | None, default("that of doctor.json, else 5")
    ] = None
    """Latency of a message between two nodes, in microseconds."""
    gpu_network: Annotated[str | None, default("450 GB/s, NVLink of an H200")] = None
    """Rate of the links between the GPUs of a node, per GPU and direction."""
    jitter: Annotated[Annotated[float, Interval(ge=0, le=1)] | None, default("that of bench.json on a GPU, else 0")] = (
        None
    )
    """Standard deviation of a rank's computing time from step to step, relative to its mean. All ranks wait for the
    slowest one."""
    min_efficiency: Annotated[float, Interval(gt=0.5, le=1)] = 0.7
    """Nodes are useful as long as each doubling gives at least 2 x this factor of images/s."""
    json: Annotated[Path | None, default("not written")] = None
    """JSON file to write; - writes it to standard output instead of the tables."""

    def __post_init__(self) -> None:
        check_ranges(self)
        _ = self.spec, self.node_counts, self.global_batches  # raise an error if they are invalid

    @property
    def spec(self) -> ModelSpec:
        """The model that `variant` or `model` names.

        Raises:
            UserError: the name is invalid, or both name different models.
        """
        from launch.config.model import ModelConfig

        return ModelConfig(variant=self.variant, model=self.model).spec

    @property
    def node_counts(self) -> tuple[int, ...]:
        """`nodes`, parsed: ascending, without repetitions."""
        return _numbers("--nodes", self.nodes, MAX_NODES)

    @property
    def global_batches(self) -> tuple[int, ...]:
        """`global_batch`, parsed: ascending, without repetitions."""
        return _numbers("--global-batch", self.global_batch, MAX_BATCH)

    def run(self) -> int:
        from launch.capacity.json_file import to_json
        from launch.capacity.plan import plan
        from launch.capacity.tables import show
        from shards.table_console import table_console

        if self.json is not None:
            check_output(self.json, "--json")
        found = plan(self)
        if self.json is not None:
            import json

            from shards.files.output import write_output

            write_output(self.json, (json.dumps(to_json(found), indent=1) + "\n").encode(), "--json")
        if not is_standard_output(self.json):
            show(found, table_console())
        return 0


def _numbers(option: str, text: str, largest: int) -> tuple[int, ...]:
    """Parse whole numbers that are separated by commas.

    Raises:
        CapacityError: an entry is not a whole number from 1 to `largest`.
    """
    found = set()
    for entry in (part.strip() for part in text.split(",")):
        if not (entry.isascii() and entry.isdecimal() and len(entry) <= 9 and 1 <= int(entry) <= largest):
            raise CapacityError(
                f"{option} {printable(text[:60])}: {printable(entry[:20]) or 'an empty entry'} is not a whole number "
                f"from 1 to {largest:,}; write numbers separated by commas, such as 1,2,4"
            )
        found.add(int(entry))
    return tuple(sorted(found))
