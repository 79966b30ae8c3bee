"""Parquet files and tars as data set hubs and tools write them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from zlib import crc32

from tests.support.source_folders.images import jpeg
from tests.support.source_folders.source import put_files, source

FORK = b"\0\5\x16\7" + bytes(60)


def parquet(root: Path, name: str, labels: list[int], names: list[str] | None = None) -> None:
    """Write a table of images and labels; `names`: class names, stored in the Hugging Face metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(crc32(f"{name} {i}".encode())), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / name)


def tar(root: Path, name: str, members: list[tuple[str, bytes]]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    put_files(root, name, gzip.compress(data, mtime=0) if name.endswith("gz") else data)


def samples(name: str, labels: list[int]) -> list[tuple[str, bytes]]:
    """Return the members of a WebDataset tar: an image and a .cls file per sample."""
    both = []
    for i, label in enumerate(labels):
        both += [(f"{i:04d}.cls", b"%d" % label), (f"{i:04d}.jpg", jpeg(crc32(f"{name} {i}".encode())))]
    return both


@source(train=4, val=2, test=2, classes=("bean rust", "healthy"), messages=(".md",), counts_files=False)
def hugging_face_parquet(root: Path) -> None:
    """data/SPLIT-00000-of-00001.parquet, with class names in the metadata."""
    names = ["bean rust", "healthy"]
    parquet(root, "data/train-00000-of-00001.parquet", [0, 1, 0, 1], names)
    parquet(root, "data/validation-00000-of-00001.parquet", [0, 1], names)
    parquet(root, "data/test-00000-of-00001.parquet", [1, 0], names)
    put_files(root, "README.md", "---\ndataset_info:\n---\n")


@source(train=4, test=2, classes=("cat", "dog"), counts_files=False)
def hugging_face_converted(root: Path) -> None:
    """The branch refs/convert/parquet: CONFIGURATION/SPLIT/0000.parquet."""
    parquet(root, "default/train/0000.parquet", [0, 1, 0, 1], ["cat", "dog"])
    parquet(root, "default/test/0000.parquet", [0, 1], ["cat", "dog"])


@source(
    train=4,
    classes=("cat", "dog"),
    messages=("test", "-1|label"),
    error=("test-00000", "-1"),
    counts_files=False,
)
def hugging_face_unlabeled_test(root: Path) -> None:
    """Withheld labels are -1, which must neither become a class nor cause a traceback."""
    parquet(root, "data/train-00000-of-00001.parquet", [0, 1, 0, 1], ["cat", "dog"])
    parquet(root, "data/test-00000-of-00001.parquet", [-1, -1], ["cat", "dog"])


@source(error=(".tar", "label|.cls"), counts_files=False)
def img2dataset_pairs(root: Path) -> None:
    """Images and captions without classes, with a Parquet file that describes each tar."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = []
    for i in range(4):
        key = f"{i:09d}"
        members += [(f"{key}.jpg", jpeg(i)), (f"{key}.txt", b"a caption"), (f"{key}.json", b'{"status": "success"}')]
    tar(root, "00000.tar", members)
    put_files(root, "00000_stats.json", "{}")
    pq.write_table(pa.table({"url": ["https://example.org/1"], "caption": ["a caption"]}), root / "00000.parquet")


@source(train=6, classes=("0", "1"), counts_files=False)
def webdataset_from_macos(root: Path) -> None:
    """Written by bsdtar of macOS: names begin with ./, and a resource fork precedes each member."""
    members = []
    for name, data in samples("macos", [0, 1, 0, 1, 0, 1]):
        members += [(f"./._{name}", FORK), (f"./{name}", data)]
    tar(root, "shard-000000.tar", members)


@source(train=4, val=2, test=2, classes=("0", "1"), messages=(".json",), counts_files=False)
def webdataset_of_three_splits(root: Path) -> None:
    """The split is in the middle of the names of the tars."""
    for split, labels in (("train", [0, 1, 0, 1]), ("val", [0, 1]), ("test", [1, 0])):
        tar(root, f"pets-{split}-000000.tar", samples(split, labels))
    put_files(root, "pets-sizes.json", "{}")


@source(train=4, classes=("0", "1"), error=("gzip|compress|unpack",), counts_files=False)
def webdataset_gzipped(root: Path) -> None:
    """A .tar.gz must be read, or rejected by name."""
    tar(root, "shard-000000.tar.gz", samples("gz", [0, 1, 0, 1]))


@source(train=3, classes=("0", "1"), messages=("without|no label|no image|not used",), counts_files=False)
def webdataset_with_incomplete_samples(root: Path) -> None:
    """A sample without a label and one without an image are not used, which is reported."""
    members = samples("holes", [0, 1, 0, 1, 0])
    del members[-1], members[2]  # an image; then a label
    tar(root, "shard-000000.tar", members)


@source(train=9, classes=("n00000000", "n00000001", "n00000002"), counts_files=False)
def imagenet_21k_class_tars(root: Path) -> None:
    """One tar per class, named by its synset."""
    for synset in ("n00000000", "n00000001", "n00000002"):
        tar(root, f"{synset}.tar", [(f"{synset}_{i}.JPEG", jpeg(crc32(f"{synset}{i}".encode()))) for i in range(3)])


@source(train=6, val=2, classes=("n00000000", "n00000001"), counts_files=False)
def class_tars_in_splits(root: Path) -> None:
    """Class tars in train/ and val/."""
    for split, count in (("train", 3), ("val", 1)):
        for synset in ("n00000000", "n00000001"):
            images = [(f"{synset}_{i}.JPEG", jpeg(crc32(f"{split}{synset}{i}".encode()))) for i in range(count)]
            tar(root, f"{split}/{synset}.tar", images)
