"""The `pipeline` command: one verb per job, each a frozen dataclass with a `run` method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import subcommand

from pipeline.look import Look
from pipeline.options import LoaderOptions
from shards.commands import Index, Info, SampleDigits, SamplePhotos, Shard, Verify
from shards.errors import UserError


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
class Bench:
    """Measure loader alone, model alone and both together: who waits for whom, and what limits."""

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    variant: Literal["b0", "b1", "b2", "b3"] = "b0"
    """FAT variant to train."""
    batch_size: int | None = None
    """Images per step. None = 256 on a GPU, 16 on CPUs."""
    steps: int | None = None
    """Steps per round of each measurement; there are three rounds. None = 30 on a GPU, 6 on CPUs."""
    size: int = 224
    """Side of the images in pixels."""
    augment: Literal["fat", "light", "none"] = "fat"
    """Augmentation recipe."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto = bf16 autocast on GPUs, fp32 on CPUs."""
    compile: Literal["off", "auto", "default", "reduce-overhead", "max-autotune"] = "off"
    """torch.compile mode; auto = try them and take the fastest (GPUs only)."""
    zero: Literal["auto", 0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; 0 = plain."""
    cache: Path | None = None
    """Where a remote set is staged. None = $FAT_CACHE, else in the temporary folder."""
    json: Path | None = None
    """File for all figures."""
    chart: Path = Path("bench.png")
    """Bar chart to write."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)

    def run(self) -> int:
        import dataclasses

        import torch

        from launch.bench import bench, write_json
        from launch.bench_chart import write_chart
        from launch.bench_verdict import table
        from launch.recipe import VARIANTS

        for name in ("batch_size", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")
        cuda = torch.cuda.is_available()
        base = VARIANTS[self.variant]()
        data = dataclasses.replace(
            base.data,
            data=self.dataset,
            cache=self.cache,
            size=self.size,
            augment=self.augment,
            global_batch=self.batch_size or (256 if cuda else 16),
            loader=self.loader,
        )
        how = dataclasses.replace(base.run, precision=self.precision, compile=self.compile, zero=self.zero)
        steps = self.steps or (30 if cuda else 6)
        figures = bench(dataclasses.replace(base, data=data, run=how), steps=steps)
        print(table(figures))
        if self.json is not None:
            write_json(figures, self.json)
        write_chart(figures, self.chart)
        return 0


VERBS: dict[str, Callable[..., Any]] = {
    "shard": Shard,
    "index": Index,
    "verify": Verify,
    "info": Info,
    "look": Look,
    "bench": Bench,
    "sample": Sample,
}
DESCRIPTION = "Make, check and look at shard sets for training vision backbones."
INTERRUPTED = 130  # as shells report a process ended by Ctrl-C


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 the job failed, 2 bad input."""
    command = tyro.extras.subcommand_cli_from_dict(
        VERBS, args=args, prog="pipeline", description=DESCRIPTION, config=(tyro.conf.OmitArgPrefixes,)
    )
    try:
        return int(command.run())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `pipeline info SET | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
