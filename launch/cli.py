"""The `pipeline` command: one verb per job, each a frozen dataclass with a `run` method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval
from tyro.conf import subcommand

from pipeline.look import Look
from pipeline.options import LoaderOptions
from shards.commands.command_line import Index, Info, SampleDigits, SamplePhotos, Shard, Verify
from shards.cores import limit_openmp
from shards.errors import UserError, lack_of_files, report
from shards.files.output import check_output
from shards.open_files import raise_limit
from shards.ranges import MAX_BATCH, Batch, check_ranges
from shards.redact import printable, protect_output

CHART_FORMATS = (".png", ".pdf", ".svg")
ModelSide = Annotated[int, Interval(ge=32, le=8192)]


@dataclass(frozen=True)
class Sample:
    """Make a small real data set as an ImageNet-like folder."""

    what: (
        Annotated[SampleDigits, subcommand("digits", prefix_name=False)]
        | Annotated[SamplePhotos, subcommand("photos", prefix_name=False)]
    )

    def run(self) -> int:
        return self.what.run()


@dataclass(frozen=True)
class _Training:
    """What would be trained."""

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    variant: Literal["b0", "b1", "b2", "b3"] = "b0"
    """FAT variant to train."""
    batch_size: Batch | None = None
    """Images per step. None = 256 on a GPU, 16 on CPUs."""
    size: ModelSide = 224
    """Side of the images in pixels."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation recipe."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto = bf16 autocast on GPUs, fp32 on CPUs."""
    set_digest: str | None = None
    """xxh3=HEX or sha256=HEX that the set's dataset.json must have, as 'pipeline info' prints them."""
    cache: Path | None = None
    """Folder in which a remote set is staged. None = $FAT_CACHE, else the temporary folder."""
    cache_shared: bool = False
    """All users in the group of that folder use one cache, instead of one each."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def __post_init__(self) -> None:
        check_ranges(self)

    def _recipe(self, *, zero: Any, compile: Any = None) -> Any:
        """The recipe (`launch.config.recipe.Recipe`)."""
        import dataclasses

        import torch

        from launch.config.recipe import VARIANTS

        base = VARIANTS[self.variant]()
        data = dataclasses.replace(
            base.data,
            data=self.dataset,
            set_digest=self.set_digest,
            cache=self.cache,
            cache_shared=self.cache_shared,
            size=self.size,
            augment=self.augment,
            global_batch=self.batch_size or (256 if torch.cuda.is_available() else 16),
            loader=self.loader,
        )
        parallel = dataclasses.replace(base.parallel, precision=self.precision, zero=zero)
        how = dataclasses.replace(base.compile, compile=compile)
        return dataclasses.replace(base, data=data, parallel=parallel, compile=how)


@dataclass(frozen=True)
class Bench(_Training):
    """Measure loader alone, model alone and both together: who waits for whom, and what limits."""

    steps: Annotated[int, Interval(ge=1, le=1_000_000)] | None = None
    """Steps per round of each measurement; there are three rounds. None = 30 on a GPU, 6 on CPUs."""
    compile: Literal["off", "cudagraphs", "default", "reduce-overhead", "max-autotune"] | None = None
    """cudagraphs, or a torch.compile mode. None = cudagraphs on GPUs and off on CPUs."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; 0 = plain. auto = 0, as in training with one process."""
    decoder_check: bool = True
    """On a GPU, also compare its JPEG engine with the CUDA decoder: pixels and speed; some seconds."""
    json: Path | None = None
    """File for all figures."""
    chart: Path = Path("bench.png")
    """Bar chart to write."""

    def run(self) -> int:
        import torch

        from launch.bench.chart import write_chart
        from launch.bench.run import bench, write_json
        from launch.bench.verdict import table

        if self.json is not None:
            check_output(self.json, "--json")
        check_output(self.chart, "--chart", CHART_FORMATS)
        steps = self.steps or (30 if torch.cuda.is_available() else 6)
        recipe = self._recipe(compile=self.compile, zero=self.zero)
        figures = bench(recipe, steps=steps, decoder_check=self.decoder_check)
        print(*map(printable, table(figures).splitlines()), sep="\n")
        if self.json is not None:
            write_json(figures, self.json)
        write_chart(figures, self.chart)
        return 0


@dataclass(frozen=True)
class Tune(_Training):
    """Measure how model and loader run fastest on this machine, and keep it: training then does so by itself.

    Give what training will have: variant, size, --batch-size (images of one process and forward pass), --ranks. What is
    given of the loader's options is not tried otherwise.
    """

    ranks: Annotated[int, Interval(ge=1, le=1024)] = 1
    """Processes that training will have on this machine: each has its share of the cores."""
    accumulation: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Micro-batches per optimiser step that training will have."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage that training will have. auto = 1 with --ranks of several GPUs, else 0."""
    what: Literal["both", "model", "input"] = "both"
    """What to measure."""
    seconds: Annotated[float, Interval(gt=0, le=1_000_000)] = 60.0
    """About what model and input may take, each; compiling the model (on GPUs) takes minutes more."""

    def run(self) -> int:
        import dataclasses

        from launch.tuning.command import PARTS, tune

        recipe = self._recipe(zero=self.zero)
        rows = recipe.data.global_batch
        if self.accumulation * rows > MAX_BATCH:
            raise UserError(
                f"--accumulation {self.accumulation} of {rows} images: a global batch of at most {MAX_BATCH:,} expected"
            )
        data = dataclasses.replace(recipe.data, micro_batch=rows, global_batch=self.accumulation * rows)
        parts = tuple(part for part in PARTS if self.what in ("both", part))
        tune(dataclasses.replace(recipe, data=data), parts, ranks=self.ranks, seconds=self.seconds, say=_say)
        return 0


VERBS: dict[str, Callable[..., Any]] = {
    "shard": Shard,
    "index": Index,
    "verify": Verify,
    "info": Info,
    "look": Look,
    "bench": Bench,
    "tune": Tune,
    "sample": Sample,
}


def _say(line: str) -> None:
    print(printable(line))


DESCRIPTION = "Make, check and look at shard sets for training vision backbones."
INTERRUPTED = 130  # as shells report a process ended by Ctrl-C


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 the job failed, 2 bad input."""
    protect_output()
    limit_openmp()
    raise_limit()
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            VERBS, args=args, prog="pipeline", description=DESCRIPTION, config=(tyro.conf.OmitArgPrefixes,)
        )
        return int(command.run())
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `pipeline info SET | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        if (judged := lack_of_files(error)) is None:
            raise
        return report(judged)


if __name__ == "__main__":
    sys.exit(main())
