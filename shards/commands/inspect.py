"""The subcommands verify and info, which read a set: options with their help; `run()` returns the exit status."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval
from tyro.conf import Positional, arg

from shards.errors import UserError
from shards.files.output import check_output, is_standard_output, write_output
from shards.option_help import default
from shards.ranges import check_ranges
from shards.redact import one_line, redacted

if TYPE_CHECKING:
    from shards.format.dataset import ShardSet

Workers = Annotated[int, Interval(ge=1, le=4096)]
Json = Annotated[Path | None, default("not written")]


@dataclass(frozen=True)
class Verify:
    """Check every byte of a set: file hashes, tar headers, index rows, image headers and labels."""

    set: Positional[Annotated[Path, arg(metavar="SET")]]
    """Folder of the set."""

    workers: Annotated[Workers | None, default("one per available CPU core")] = None
    """Number of worker processes."""

    set_digest: Annotated[str | None, default("not checked")] = None
    """Expected digest of the set's dataset.json: xxh3=HEX or sha256=HEX, as printed by 'pipeline info'.
    Appending #xxh3=HEX to SET does the same."""

    json: Json = None
    """JSON file to write, with the list of faults; - writes it to standard output instead of the text."""

    def run(self) -> int:
        from shards.commands.verify import verify

        check_ranges(self)
        if self.json is not None:
            check_output(self.json, "--json")
        path = _open(self.set, self.set_digest).path
        faults = verify(path, self.workers)
        if self.json is not None:
            _write_json({"path": str(path), "faults": faults}, self.json)
        if not is_standard_output(self.json):
            for fault in faults:
                _print(f"fault: {fault}")
            _print(f"{path}: {f'{len(faults)} faults' if faults else 'no faults, every byte was checked'}")
        return 1 if faults else 0


@dataclass(frozen=True)
class Info:
    """Print the contents of a set: splits, classes, image sizes, options, rejects and digests."""

    set: Positional[Annotated[Path, arg(metavar="SET")]]
    """Folder of the set."""

    set_digest: Annotated[str | None, default("not checked")] = None
    """Expected digest of the set's dataset.json: xxh3=HEX or sha256=HEX, as printed by 'pipeline info'.
    Appending #xxh3=HEX to SET does the same."""

    classes: Annotated[int, Interval(ge=0, le=10**9)] = 10
    """Number of classes to list; 0 lists all of them."""

    json: Json = None
    """JSON file to write, with all classes; - writes it to standard output instead of the tables."""

    def run(self) -> int:
        from rich.console import Console

        from shards.commands.info import describe, to_dict

        check_ranges(self)
        if self.json is not None:
            check_output(self.json, "--json")
        shard_set = _open(self.set, self.set_digest)
        if self.json is not None:
            _write_json(to_dict(shard_set), self.json)
        if not is_standard_output(self.json):
            console = Console()
            console.print(describe(shard_set, classes=self.classes or None, ascii_only=console.options.ascii_only))
        return 0


def _open(location: Path, digest: str | None) -> ShardSet:
    from shards.format.dataset import ShardSet
    from shards.format.manifest_digest import split_digest

    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", f"{location}") and not location.exists():
        raise UserError(
            f"{location}: 'pipeline info' and 'pipeline verify' read local sets only; run them where the set is stored "
            "(loaders check the hash of every sample of a remote set)"
        )
    path, expected = split_digest(location, digest)
    return ShardSet(path, digest=expected)


def _write_json(value: object, path: Path) -> None:
    write_output(path, (json.dumps(redacted(value), indent=1) + "\n").encode(), "--json")


def _print(line: str) -> None:
    print(one_line(line))
