"""Parquet files and tars as hubs and tools write them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from zlib import crc32

from tests.support.source_folders.images import jpeg
from tests.support.source_folders.source import put, source

FORK = b"\0\5\x16\7" + bytes(60)


def parquet(root: Path, name: str, labels: list[int], names: list[str] | None = None) -> None:
    """Write a table of images and labels; `names`: of the classes, in the hub's own metadata."""
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
    put(root, name, gzip.compress(data, mtime=0) if name.endswith("gz") else data)


def samples(name: str, labels: list[int]) -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar, an image and a .cls a sample."""
    both = []
    for i, label in enumerate(labels):
        both += [(f"{i:04d}.cls", b"%d" % label), (f"{i:04d}.jpg", jpeg(crc32(f"{name} {i}".encode())))]
    return both


@source(train=4, val=2, test=2, classes=("bean rust", "healthy"), says=(".md",), files_count=False)
def hugging_face_parquet(root: Path) -> None:
    """data/SPLIT-00000-of-00001.parquet, class names in the metadata."""
    names = ["bean rust", "healthy"]
    parquet(root, "data/train-00000-of-00001.parquet", [0, 1, 0, 1], names)
    parquet(root, "data/validation-00000-of-00001.parquet", [0, 1], names)
    parquet(root, "data/test-00000-of-00001.parquet", [1, 0], names)
    put(root, "README.md", "---\ndataset_info:\n---\n")


@source(train=4, test=2, classes=("cat", "dog"), files_count=False)
def hugging_face_converted(root: Path) -> None:
    """The branch refs/convert/parquet: CONFIGURATION/SPLIT/0000.parquet."""
    parquet(root, "default/train/0000.parquet", [0, 1, 0, 1], ["cat", "dog"])
    parquet(root, "default/test/0000.parquet", [0, 1], ["cat", "dog"])


@source(
    train=4,
    classes=("cat", "dog"),
    says=("test", "-1|label"),
    refused=("test-00000", "-1"),
    files_count=False,
)
def hugging_face_unlabelled_test(root: Path) -> None:
    """The hub writes -1 where a label is withheld: not a class, not a traceback."""
    parquet(root, "data/train-00000-of-00001.parquet", [0, 1, 0, 1], ["cat", "dog"])
    parquet(root, "data/test-00000-of-00001.parquet", [-1, -1], ["cat", "dog"])


@source(refused=(".tar", "label|.cls"), files_count=False)
def img2dataset_pairs(root: Path) -> None:
    """Images and captions without classes, a list of them in Parquet beside each tar."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = []
    for i in range(4):
        key = f"{i:09d}"
        members += [(f"{key}.jpg", jpeg(i)), (f"{key}.txt", b"a caption"), (f"{key}.json", b'{"status": "success"}')]
    tar(root, "00000.tar", members)
    put(root, "00000_stats.json", "{}")
    pq.write_table(pa.table({"url": ["https://example.org/1"], "caption": ["a caption"]}), root / "00000.parquet")


@source(train=6, classes=("0", "1"), files_count=False)
def webdataset_from_macos(root: Path) -> None:
    """macOS's bsdtar: ./ before the names, and a resource fork before each member."""
    members = []
    for name, data in samples("macos", [0, 1, 0, 1, 0, 1]):
        members += [(f"./._{name}", FORK), (f"./{name}", data)]
    tar(root, "shard-000000.tar", members)


@source(train=4, val=2, test=2, classes=("0", "1"), says=(".json",), files_count=False)
def webdataset_of_three_splits(root: Path) -> None:
    """The split is in the middle of the tars' names."""
    for split, labels in (("train", [0, 1, 0, 1]), ("val", [0, 1]), ("test", [1, 0])):
        tar(root, f"pets-{split}-000000.tar", samples(split, labels))
    put(root, "pets-sizes.json", "{}")


@source(train=4, classes=("0", "1"), refused=("gzip|compress|unpack",), files_count=False)
def webdataset_gzipped(root: Path) -> None:
    """.tar.gz: read, or refused by name."""
    tar(root, "shard-000000.tar.gz", samples("gz", [0, 1, 0, 1]))


@source(train=3, classes=("0", "1"), says=("without|no label|no image|not used",), files_count=False)
def webdataset_with_holes(root: Path) -> None:
    """A sample without its label, one without its image: not used, and said."""
    members = samples("holes", [0, 1, 0, 1, 0])
    del members[-1], members[2]  # an image; then a label
    tar(root, "shard-000000.tar", members)


@source(train=9, classes=("n00000000", "n00000001", "n00000002"), files_count=False)
def imagenet_21k_class_tars(root: Path) -> None:
    """One tar a class, named by its synset."""
    for synset in ("n00000000", "n00000001", "n00000002"):
        tar(root, f"{synset}.tar", [(f"{synset}_{i}.JPEG", jpeg(crc32(f"{synset}{i}".encode()))) for i in range(3)])


@source(train=6, val=2, classes=("n00000000", "n00000001"), files_count=False)
def class_tars_in_splits(root: Path) -> None:
    """Such tars in train/ and val/."""
    for split, count in (("train", 3), ("val", 1)):
        for synset in ("n00000000", "n00000001"):
            images = [(f"{synset}_{i}.JPEG", jpeg(crc32(f"{split}{synset}{i}".encode()))) for i in range(count)]
            tar(root, f"{split}/{synset}.tar", images)
