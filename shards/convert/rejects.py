"""`rejects.jsonl`: the images that a set had to leave out, with the reason for each."""

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
    """A line of the list."""

    split: str
    image: str
    """Class and file name, or tar and member."""
    reason: str


def write_rejects(work: WorkFolder, rejects: list[Reject], kept: int, max_share: float) -> str | None:
    """Write the list, and judge whether it is short enough.

    Args:
        work: work folder of the set.
        kept: images that were not rejected.
        max_share: of all images, that may be rejected.

    Returns:
        xxh3-64 of the list; None when there is nothing to list (and no list).

    Raises:
        ConversionFailed: more were rejected. The list stays.
        UserError: a file of its name is there which is not ours.
    """
    path = work.out / REJECTS_NAME
    if not rejects:
        work.withdraw(REJECTS_NAME)
        return None
    ordered = sorted(rejects, key=lambda reject: (reject["split"], reject["image"]))
    content = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in ordered).encode()
    digest = work.publish(REJECTS_NAME, content)
    if len(rejects) > max_share * (kept + len(rejects)):
        ((reason, count),) = Counter(reject["reason"] for reject in ordered).most_common(1)
        example = next(reject["image"] for reject in ordered if reject["reason"] == reason)
        raise ConversionFailed(
            f"{work.out}: {len(rejects):,} of {kept + len(rejects):,} images rejected, more than --max-rejects "
            f"{max_share:g} allows ({count:,}: {reason}, such as {example}); see {path}, then correct the source and "
            "give another --out, or allow more"
        )
    return digest


def count_reasons(rejects: list[Reject], split: str) -> dict[str, int]:
    """Reason -> images, of a split."""
    return dict(sorted(Counter(reject["reason"] for reject in rejects if reject["split"] == split).items()))


def first_rejects(folder: Path) -> dict[tuple[str, str], str]:
    """Return the first image of each (split, reason) in a set's list; empty where the list is gone or damaged."""
    first: dict[tuple[str, str], str] = {}
    with suppress(OSError, ValueError, LookupError, TypeError), (folder / REJECTS_NAME).open(encoding="utf-8") as lines:
        for line in lines:
            reject = json.loads(line)
            first.setdefault((reject["split"], reject["reason"]), reject["image"])
    return first
