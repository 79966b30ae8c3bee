"""The `pipeline` command: one verb per job, each a frozen dataclass with a `run` method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from pipeline.look import Look
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


VERBS: dict[str, Callable[..., Any]] = {
    "shard": Shard,
    "index": Index,
    "verify": Verify,
    "info": Info,
    "look": Look,
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
