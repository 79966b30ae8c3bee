"""Layout of FFCV's .beton files (format version 2) whose samples are in the order of the shard set.

FFCV's own writer stores samples in the order in which its processes finish them, re-encodes every image, writes its
header first and hangs if a process dies. Here the index determines the whole layout: pages of a fixed size, with the
images of the shards one after the other. So processes write the segments of their shards independently, the result is
always the same, and an interrupted conversion can be resumed.

    header | descriptors of two fields | metadata of every sample | pages of image bytes | allocation table

Writing it requires neither FFCV nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.format.index import Index

WriteMode = Literal["jpg", "raw", "smart"]

VERSION = 2
MIN_PAGE = 2**23  # minimum page size in bytes, FFCV's default
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
    """How a .beton file stores images."""

    mode: WriteMode = "jpg"
    """jpg: encoded. raw: decoded pixels. smart: either, depending on `smart_ratio`."""
    smart_ratio: float = 4.0
    """For mode smart: store pixels if they need at most this many times the bytes of the JPEG. At least 1."""


@dataclass(frozen=True)
class BetonLayout:
    """Offsets and sizes of all parts of a .beton file."""

    page: int
    """Page size in bytes, a power of two; no image crosses a page boundary."""
    raw: NDArray[np.bool_]
    """bool [samples]: stored as pixels instead of JPEG."""
    sizes: NDArray[np.int64]
    """int64 [samples]: stored bytes."""
    offsets: NDArray[np.int64]
    """int64 [samples]: offset of each image."""
    starts: NDArray[np.int64]
    """int64 [shards + 1]: offset of each shard's segment, and of the allocation table."""

    @property
    def total(self) -> int:
        """Return the size of the file in bytes."""
        return int(self.starts[-1]) + len(self.sizes) * ALLOCATION.itemsize

    def head(self, index: Index) -> bytes:
        """Return the bytes before the first page: header, field descriptors and metadata."""
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
        """Return the bytes after the last page: the allocation table."""
        table = np.zeros(len(self.sizes), ALLOCATION)
        table["sample_id"] = np.arange(len(self.sizes))
        table["ptr"], table["size"] = self.offsets, self.sizes
        return table.tobytes()


def compute_layout(index: Index, options: BetonOptions) -> BetonLayout:
    """Compute the offset of every sample of a split.

    Args:
        index: `INDEX_DTYPE` [samples]: index of the split's tars, in which `size` is the size of the JPEG.
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
