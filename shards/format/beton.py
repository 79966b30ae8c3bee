"""FFCV's .beton (format version 2), written from finished shards in the order of the set.

FFCV's own writer places samples in the order in which its processes get to them, re-encodes every image, writes its
header first and waits for ever for a process that died. Here the whole layout follows from the index: pages of a fixed
size, the shards' images one after the other. So processes fill their shards' parts independently, always with the same
bytes, and a killed run resumes.

    header | descriptors of two fields | metadata of every sample | pages of image bytes | allocation table

Neither FFCV nor torch is needed to write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.format.index import Index

WriteMode = Literal["jpg", "raw", "smart"]

VERSION = 2
MIN_PAGE = 2**23  # bytes; FFCV's default
_JPG, _RAW = 0, 1
_INT_FIELD, _IMAGE_FIELD = 1, 2

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocation_table", "<u8")]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


@dataclass(frozen=True, kw_only=True)
class BetonOptions:
    """What a .beton stores of an image."""

    mode: WriteMode = "jpg"
    """Its JPEG, its pixels, or whichever `smart_ratio` says."""
    smart_ratio: float = 4.0
    """With smart: pixels where they take at most this many times the JPEG's bytes. At least 1."""


@dataclass(frozen=True)
class BetonLayout:
    """Where everything stands in a .beton."""

    page: int
    """Page size in bytes, a power of two; no image crosses the border of a page."""
    raw: NDArray[np.bool_]
    """bool [samples]: stored as pixels instead of JPEG."""
    sizes: NDArray[np.int64]
    """int64 [samples]: stored bytes."""
    offsets: NDArray[np.int64]
    """int64 [samples]."""
    starts: NDArray[np.int64]
    """int64 [shards + 1]: first byte of each shard's part; the last is that of the allocation table."""

    @property
    def total(self) -> int:
        """Size of the file."""
        return int(self.starts[-1]) + len(self.sizes) * ALLOCATION.itemsize

    def head(self, index: Index) -> bytes:
        """All before the first page."""
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, 2, self.page, len(index), self.starts[-1])
        fields = np.zeros(2, FIELD)
        fields["type_id"] = _IMAGE_FIELD, _INT_FIELD
        fields["name"] = b"image", b"label"
        rows = np.zeros(len(index), METADATA)
        rows["image"]["mode"] = np.where(self.raw, _RAW, _JPG)
        rows["image"]["width"], rows["image"]["height"] = index["width"], index["height"]
        rows["image"]["data_ptr"] = self.offsets
        rows["label"] = index["label"]
        return (header.tobytes() + fields.tobytes() + rows.tobytes()).ljust(int(self.starts[0]), b"\0")

    def table(self) -> bytes:
        """All after the last page."""
        table = np.zeros(len(self.sizes), ALLOCATION)
        table["sample_id"] = np.arange(len(self.sizes))
        table["ptr"], table["size"] = self.offsets, self.sizes
        return table.tobytes()


def compute_layout(index: Index, options: BetonOptions) -> BetonLayout:
    """Place every sample of a split.

    Args:
        index: `INDEX_DTYPE` [samples]: sizes of the JPEGs and of the decoded images, and the shards.
    """
    pixels = index["height"].astype(np.int64) * index["width"] * 3
    encoded = index["size"].astype(np.int64)
    raw = pixels <= {"jpg": 0.0, "raw": np.inf, "smart": options.smart_ratio}[options.mode] * encoded
    sizes = np.where(raw, pixels, encoded)
    page = max(MIN_PAGE, 1 << int(sizes.max() - 1).bit_length())
    offsets = np.zeros(len(index), np.int64)
    starts = []
    at = -(-(HEADER.itemsize + 2 * FIELD.itemsize + len(index) * METADATA.itemsize) // page) * page
    shard = -1
    for i, (size, of) in enumerate(zip(sizes.tolist(), index["shard"].tolist(), strict=True)):
        if of != shard:
            starts.append(at)
            shard = of
        if at % page + size > page:
            at = -(-at // page) * page
        offsets[i] = at
        at += size
    return BetonLayout(page, raw, sizes, offsets, np.array([*starts, at], np.int64))
