"""The data set of the soak: 960 of scikit-learn's digits, so that an epoch of batches of 48 has all of them."""

from __future__ import annotations

from pathlib import Path

from shards.convert.convert import convert
from shards.convert.options import Options
from shards.sources.scan import ScanOptions
from tests.support.commands import run_pipeline

PER_CLASS = {"train": 96, "val": 5}
SHARD_BYTES = 200_000


def digits(folder: Path) -> Path:
    """Create the shard set in `folder`, or return the one that is there."""
    found, images = folder / "set", folder / "images"
    if not found.exists():
        run_pipeline("sample", "digits", images)
        for split, count in PER_CLASS.items():
            for of_class in sorted((images / split).iterdir()):
                for extra in sorted(of_class.iterdir())[count:]:
                    extra.unlink()
        convert(images, found, Options(scan=ScanOptions(workers=1), shard_bytes=SHARD_BYTES))
    return found
