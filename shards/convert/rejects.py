"""`rejects.jsonl`: the images that were not converted, with the reason for each."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from shards.convert.work_folder import WorkFolder
from shards.errors import ConversionFailed
from shards.format.manifest import REJECTS_NAME


class Reject(TypedDict):
    """One line of rejects.jsonl."""

    split: str
    image: str
    """Name of the image: class and file name, or tar and member name."""
    reason: str


def write_rejects(work: WorkFolder, rejects: list[Reject], kept: int, max_fraction: float) -> str | None:
    """Write rejects.jsonl, and raise an error if too many images were rejected.

    Args:
        work: work folder of the set.
        kept: number of images that were not rejected.
        max_fraction: maximum fraction of all images that may be rejected.

    Returns:
        xxh3-64 of the file; None if no image was rejected, in which case no file is written.

    Raises:
        ConversionFailed: more than `max_fraction` of the images were rejected. The file is kept.
        UserError: a rejects.jsonl exists that this project did not create.
    """
    path = work.out / REJECTS_NAME
    if not rejects:
        work.remove_published(REJECTS_NAME)
        return None
    ordered = sorted(rejects, key=lambda reject: (reject["split"], reject["image"]))
    content = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in ordered).encode()
    digest = work.publish(REJECTS_NAME, content)
    if len(rejects) > max_fraction * (kept + len(rejects)):
        ((reason, count),) = Counter(reject["reason"] for reject in ordered).most_common(1)
        example = next(reject["image"] for reject in ordered if reject["reason"] == reason)
        raise ConversionFailed(
            f"{work.out}: {len(rejects):,} of {kept + len(rejects):,} images rejected, more than --max-rejects "
            f"{max_fraction:g} allows ({count:,}: {reason}, such as {example}); see {path}, then correct the source "
            "and convert it to another --out, or increase --max-rejects"
        )
    return digest


def count_reasons(rejects: list[Reject], split: str) -> dict[str, int]:
    """Return reason -> number of rejected images, for one split."""
    return dict(sorted(Counter(reject["reason"] for reject in rejects if reject["split"] == split).items()))


def first_rejects(folder: Path) -> dict[tuple[str, str], str]:
    """Return the first image of each (split, reason) in rejects.jsonl; empty if the file is missing or damaged."""
    first: dict[tuple[str, str], str] = {}
    with suppress(OSError, ValueError, LookupError, TypeError), (folder / REJECTS_NAME).open(encoding="utf-8") as lines:
        for line in lines:
            reject = json.loads(line)
            first.setdefault((reject["split"], reject["reason"]), reject["image"])
    return first
