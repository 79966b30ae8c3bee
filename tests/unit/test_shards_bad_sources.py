"""Invalid, damaged, and malicious sources are rejected with a one-line error, in bounded time and memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from shards.commands.index_tars import index_tars
from shards.convert.conversion_plan import assign_to_shards
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.convert.parts import ConversionPart
from shards.convert.work_folder import WorkFolder
from shards.convert.writer import ContainerReader
from shards.errors import UserError
from shards.files.regular import NotRegular, open_regular, read_bounded
from shards.format.dataset import ShardSet
from shards.format.manifest_fields import MAX_CLASSES
from shards.images.rules import ImageRules
from shards.redact import one_line
from shards.sources.layouts import ilsvrc, parquet, parquet_unpack
from shards.sources.layouts.members import members
from shards.sources.listing import Container, ListingBuilder
from shards.sources.naming import classes
from shards.sources.naming.labels import parse_label
from shards.sources.scan import ScanOptions
from shards.workers.worker import Reporter

ONE = Options(scan=ScanOptions(workers=1))
CORPUS = Path(__file__).resolve().parents[1] / "fuzz/corpus"


@pytest.fixture(autouse=True)
def _pyarrow_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run pyarrow in this process, because starting one takes longer than most of these tests."""
    monkeypatch.setattr(parquet, "ISOLATED", False)


def jpeg(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


IMAGES = [jpeg(i) for i in range(4)]
Entries = list[tuple[str | tarfile.TarInfo, bytes]]


def tarred(entries: Entries, form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def labeled(label: bytes) -> Entries:
    return [("a.jpg", IMAGES[0]), ("a.cls", label), ("b.jpg", IMAGES[1]), ("b.cls", b"0")]


SAMPLE: Entries = [("z.jpg", IMAGES[3]), ("z.cls", b"0")]


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a header block with arbitrary bytes in the size field."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157], block[257:265] = b"0000644\0", size, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return raw_header(b"pax", b"%011o\0" % len(records), b"x") + records.ljust(-(-len(records) // 512) * 512, b"\0")


def assert_rejected(source: Path, tmp_path: Path, message: str, options: Options = ONE) -> UserError:
    """Assert that the conversion is rejected as invalid input and creates no files."""
    with pytest.raises(UserError, match=message) as caught:
        convert(source, tmp_path / "set", options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()
    return caught.value


TARS: dict[str, tuple[bytes, str]] = {
    "negative label": (tarred(labeled(b"-1")), "a.cls: label -1 means that the image has no label"),
    "label with underscore": (tarred(labeled(b"1_0")), "label 0, but"),
    "arabic digits": (tarred(labeled("٣".encode())), "b.cls: label 0, but "),
    "padded label": (tarred(labeled(b"0" * 24 + b"5")), "has more than 20 digits"),
    "empty label": (tarred(labeled(b"")), "label '' means that the image has no label"),
    "label 2^32": (tarred(labeled(b"4294967296")), "label 4294967296 is out of range; expected a class number from 0"),
    "label 50 million": (tarred(labeled(b"50000000")), "label 50000000 is out of range; expected a class number"),
    "two image suffixes with dots": (
        tarred([("a.left.jpg", IMAGES[1]), ("a.right.jpg", IMAGES[0]), ("a.cls", b"1")]),
        r"key 'a' with suffix 'left.jpg', and the tar has 2 such image suffixes",
    ),
    "repeated key": (
        tarred([("a.jpg", IMAGES[0]), ("a.cls", b"1"), ("a.jpg", IMAGES[1]), ("a.cls", b"0")]),
        "a.jpg: key 'a' has two files with suffix 'jpg'",
    ),
    "hard link": (
        tarred([*SAMPLE, (special("h.jpg", tarfile.LNKTYPE, "z.jpg"), b""), ("h.cls", b"0")]),
        "h.jpg is a link to z.jpg",
    ),
    "symbolic link": (
        tarred([*SAMPLE, (special("h.cls", tarfile.SYMTYPE, "/etc/passwd"), b""), ("h.jpg", IMAGES[0])]),
        "h.cls is a link to /etc/passwd",
    ),
    "GNU sparse": (raw_header(b"a.jpg", b"%011o\0" % 512, b"S") + bytes(1536), "a.jpg is a sparse file"),
    "pax sparse 1.0 with a huge map": (
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
        + raw_header(b"a.jpg", b"%011o\0" % 512)
        + b"999999999\n".ljust(512, b"\0"),
        "a.jpg is a sparse file",
    ),
    "negative size": (raw_header(b"a.jpg", b"\xff" * 12) + bytes(1024), "a.jpg has an invalid size of -1 bytes"),
    "size of 8 EiB": (
        raw_header(b"a.jpg", b"\x80\0\0\0\x7f" + b"\xff" * 7) + bytes(1024),
        "truncated: the file ends within a.jpg",
    ),
    "negative pax size": (
        pax(b"14 size=-1024\n") + raw_header(b"a.jpg", b"%011o\0" % 0) + bytes(1024),
        "a.jpg has an invalid size.* -1,024 bytes",
    ),
    "long name of 1 GiB": (
        raw_header(b"././@LongLink", b"%011o\0" % 2**30, b"L") + bytes(4096),
        "contains a header of 1,073,741,824 bytes; at most 131,072",
    ),
    "pax header of 1 GiB": (raw_header(b"pax", b"%011o\0" % 2**30, b"x") + bytes(4096), "a header of 1,073,741,824"),
    "chain of 2000 pax headers": (pax(b"9 a=abcd\n") * 2000 + tarred(SAMPLE), "not a tar, or damaged"),
    "gzip": (
        gzip.compress(tarred(SAMPLE)),
        r"compressed with gzip.*; decompress it \(mv \S+a.tar .*&& gunzip \S+a.tar.gz\)",
    ),
    "text": (b"hello world" * 200, "not a tar, or damaged"),
    "empty": (b"", "not a tar, or damaged"),
    "newline in a name": (tarred([("a\nerror: b.jpg", IMAGES[0]), ("a\nerror: b.cls", b"x")]), r"a\\nerror: b.cls"),
}


@pytest.mark.parametrize("name", TARS)
def test_invalid_tars_are_rejected_by_shard_and_index(name: str, tmp_path: Path) -> None:
    content, message = TARS[name]
    (tmp_path / "in").mkdir()
    tar = tmp_path / "in" / "a.tar"
    tar.write_bytes(content)
    assert_rejected(tar.parent, tmp_path, message)
    with pytest.raises(UserError, match=message) as caught:
        index_tars([tar], ImageRules(), workers=1)
    assert "\n" not in str(caught.value)
    assert list(tar.parent.iterdir()) == [tar], "index must not create files"


@pytest.mark.parametrize(
    ("text", "label"), [(b"0", 0), (b"7\n", 7), (b" 42 ", 42), (b"00017", 17), (b"999999", MAX_CLASSES - 1)]
)
def test_labels_are_ascii_decimal_digits(text: bytes, label: int) -> None:
    assert parse_label(text, "a.cls") == label


def test_member_names_are_never_used_as_paths(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside"
    entries: Entries = [
        ("../outside/a.jpg", IMAGES[0]),
        ("../outside/a.cls", b"1"),
        (f"{outside}/b.jpg", IMAGES[1]),
        (f"{outside}/b.cls", b"0"),
        ("caf\udce9/c.jpg", IMAGES[2]),
        ("caf\udce9/c.cls", b"0"),
        (special("d", tarfile.CHRTYPE), b""),
        (special("e", tarfile.FIFOTYPE), b""),
    ]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "in" / "a.tar").write_bytes(out.getvalue())
    convert(tmp_path / "in", tmp_path / "set", ONE)
    index_tars([tmp_path / "in" / "a.tar"], ImageRules(), workers=1)
    assert not outside.exists()
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as made:
        assert all(not name.startswith("/") and ".." not in name for name in made.getnames())


def test_a_reject_whose_name_is_not_utf8_is_listed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in (("a\udcff.jpg", b"no image"), ("a\udcff.cls", b"0"), ("b.jpg", IMAGES[0]), ("b.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    index_tars([tmp_path / "a.tar"], ImageRules(), max_rejects=0.5, workers=1)
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["image"] == r"a.tar/a\udcff.jpg"


def test_an_inner_tar_without_end_of_archive_blocks_ends_before_the_next_member(tmp_path: Path) -> None:
    inner = [tarred([(f"n0000000{i}_0.JPEG", IMAGES[i])]) for i in (1, 2)]
    without_end = inner[0].rstrip(b"\0")
    without_end = without_end.ljust(-(-len(without_end) // 512) * 512, b"\0")
    train = tmp_path / "ILSVRC2012_img_train.tar"
    train.write_bytes(tarred([("n00000001.tar", without_end), ("n00000002.tar", inner[1])]))
    found = members(train)
    (only,) = members(train, found[0].offset, found[0].offset + found[0].size)
    assert only.name == "n00000001_0.JPEG"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 40), cut=st.floats(0, 1))
def test_a_damaged_tar_is_read_or_raises_a_user_error(seed: int, flips: int, cut: float, tmp_path: Path) -> None:
    draw = random.Random(seed)
    form = draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    entries: Entries = [
        (f"{'long/' * draw.choice([0, 25 if form == tarfile.USTAR_FORMAT else 60])}{i}.{s}", d)
        for i in range(3)
        for s, d in (("jpg", IMAGES[i]), ("cls", b"1"))
    ]
    data = bytearray(tarred(entries, form))
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(flips):
        block = draw.choice(headers)
        data[block + draw.randrange(512)] = draw.randrange(256)
        # The parser stops at a wrong checksum, so most checksums are corrected.
        if draw.random() < 0.9:
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    path = tmp_path / "a.tar"
    path.write_bytes(data[: int(len(data) * (1 if cut > 0.5 else 2 * cut))])
    try:
        found = members(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(member.size >= 0 and member.offset + member.size <= len(data) for member in found)


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, **how: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **how)
    return path


def column(values: list[Any], kind: str) -> Any:
    import pyarrow as pa

    return pa.array(values, getattr(pa, kind)())


PARQUET: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "null image": (lambda: {"image": [*IMAGES[:3], None], "label": [0] * 4}, "row 3 has no image bytes"),
    "null label": (
        lambda: {"image": IMAGES, "label": [0, 1, 0, None]},
        "row 3: label None means that the image has no label",
    ),
    "negative label": (lambda: {"image": IMAGES, "label": [0, 1, 0, -2]}, "row 3: label -2"),
    "text and numbers": (lambda: {"image": IMAGES, "label": ["0", "b", "0", "b"]}, "row 1: label 'b', but "),
    "float labels": (lambda: {"image": IMAGES, "label": [0.0, 1.0, 0.5, 0.0]}, "row 2: label 0.5 is not a class"),
    "list labels": (lambda: {"image": IMAGES, "label": [[0]] * 4}, "column label has type list"),
    "label 2^40": (lambda: {"image": IMAGES, "label": [0, 0, 0, 2**40]}, "row 3: label 1099511627776 is out of range"),
    "label 50 million": (lambda: {"image": IMAGES, "label": [0, 0, 0, 50_000_000]}, "row 3: label 50000000 is out of"),
    "zero rows": (
        lambda: {"image": column([], "binary"), "label": column([], "int64")},
        "its Parquet files contain no images with labels",
    ),
    "images of integers": (lambda: {"image": [1] * 4, "label": [0] * 4}, "column image has type int64"),
    "images of text": (lambda: {"image": ["x"] * 4, "label": [0] * 4}, "column image has type string"),
    "paths of integers": (
        lambda: {"image": [{"bytes": image, "path": 5} for image in IMAGES], "label": [0] * 4},
        "cannot hold image bytes",
    ),
    "no bytes": (lambda: {"image": [{"path": "x"}] * 4, "label": [0] * 4}, "cannot hold image bytes"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_invalid_parquet_columns_are_rejected(name: str, tmp_path: Path) -> None:
    columns, message = PARQUET[name]
    write_parquet(tmp_path / "in" / "train.parquet", columns())
    assert_rejected(tmp_path / "in", tmp_path, message)


def _flip(at: int, data: bytes) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


PARQUET_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a Parquet file, or truncated"),
    "truncated": (lambda data: data[: len(data) // 2], "not a Parquet file, or truncated"),
    "footer flipped": (lambda data: _flip(len(data) - 150, _flip(len(data) - 200, data)), "damaged"),
    "footer of 2 GiB": (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "has 2,147,483,647 bytes of metadata"),
    "footer larger than the file": (lambda data: data[:-8] + b"\xff\xff\x0f\x00PAR1", "damaged"),
    "first page header": (lambda data: data[:4] + bytes(60) + data[64:], "damaged"),
    "page flipped": (lambda data: _flip(600, data), "damaged"),
}


@pytest.mark.parametrize("name", PARQUET_DAMAGE)
def test_damaged_parquet_files_are_rejected(name: str, tmp_path: Path) -> None:
    damage, message = PARQUET_DAMAGE[name]
    path = write_parquet(
        tmp_path / "in" / "train.parquet", {"image": IMAGES, "label": [0, 1, 0, 1]}, write_page_checksum=True
    )
    path.write_bytes(damage(path.read_bytes()))
    assert_rejected(tmp_path / "in", tmp_path, f"train.parquet: {message}")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 8))
def test_a_damaged_parquet_file_is_read_or_raises_a_user_error(seed: int, flips: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    path = write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "label": [0, 1, 0, 1]})
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(flips):
        data[draw.randrange(footer if draw.random() < 0.7 else 4, len(data))] = draw.randrange(256)
    path.write_bytes(data)
    job = parquet_unpack.UnpackJob(path, tmp_path / "spool.bin")
    job.record.unlink(missing_ok=True)
    try:
        parquet_unpack.inspect(path, Reporter(lambda items, size: None))
        parquet_unpack.unpack(job, Reporter(lambda items, size: None))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_parquet_file_that_crashes_pyarrow_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The footer of this fuzzed file makes pyarrow 26 call std::terminate."""
    monkeypatch.setattr(parquet, "ISOLATED", True)
    (tmp_path / "in").mkdir()
    shutil.copy(CORPUS / "parquet/aborts_pyarrow.parquet", tmp_path / "in" / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet"):
        convert(tmp_path / "in", tmp_path / "set", Options())


def test_too_large_column_chunks_are_rejected_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "in" / "train.parquet", {"image": IMAGES, "label": [0, 1, 0, 1]})
    monkeypatch.setattr(parquet_unpack, "MAX_CHUNK", 500)
    monkeypatch.setattr(parquet, "unpack", None)
    assert_rejected(tmp_path / "in", tmp_path, r"row group 0 has [0-9,]+ bytes in column image; at most 500")


def test_parquet_files_with_a_too_high_compression_ratio_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary page stores 500 copies of an image of 64 KiB in a small file."""
    image = random.Random(0).randbytes(2**16)
    write_parquet(tmp_path / "in" / "train.parquet", {"image": [image] * 500, "label": [0] * 500})
    monkeypatch.setattr(parquet_unpack, "_SMALL", 2**20)
    message = "row [0-9]+: the file unpacks to more than [0-9,]+ bytes, 100 times its size"
    assert_rejected(tmp_path / "in", tmp_path, message)


@pytest.mark.parametrize("names", [[1, 2], "cat", {"a": 1}, ["a", None]])
def test_class_names_of_a_wrong_type_are_not_used(
    names: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    write_parquet(tmp_path / "in" / "train.parquet", {"image": IMAGES, "label": [0, 1, 0, 1]}, metadata)
    convert(tmp_path / "in", tmp_path / "set", ONE)
    assert [entry.title for entry in ShardSet(tmp_path / "set").manifest.classes] == ["0", "1"]
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"info": 1}', "[" * 100_000, '{"info":{"features":{"label":[]}}}'])
def test_damaged_hub_metadata_is_not_used(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"image": IMAGES, "label": [0, 1, 0, 1]}
    write_parquet(tmp_path / "in" / "train.parquet", columns, {"huggingface": text})
    convert(tmp_path / "in", tmp_path / "set", ONE)
    assert "Hugging Face metadata is damaged" in capsys.readouterr().err


def test_class_names_with_lone_surrogates_are_escaped(tmp_path: Path) -> None:
    metadata = {"huggingface": r'{"info": {"features": {"label": {"names": ["a\ud800\n", "b"]}}}}'}
    write_parquet(tmp_path / "in" / "train.parquet", {"image": IMAGES, "label": [0, 1, 0, 1]}, metadata)
    convert(tmp_path / "in", tmp_path / "set", ONE)
    assert ShardSet(tmp_path / "set").manifest.classes[0].folder == r"a\ud800\n"


def test_spool_files_are_not_used_for_another_source_file(tmp_path: Path) -> None:
    """A new source file that sorts before the others renumbers the spool files."""
    spool = tmp_path / "spool"
    for name, label in (("train-1.parquet", 1), ("train-0.parquet", 0)):
        write_parquet(tmp_path / "in" / name, {"image": IMAGES[label : label + 1], "label": [label]})
        found = parquet.scan_parquet(tmp_path / "in", spool, 1).splits["train"]
    assert sorted(found.rows["label"]) == [0, 1]
    listed = [(entry.container.path, entry.offset, entry.size, entry.label) for entry in found.entries(0, 2)]
    for path, offset, size, label in listed:
        assert offset is not None
        assert path.read_bytes()[offset : offset + size] == IMAGES[label]
    (spool / "00000.json").write_bytes(b"damaged")
    assert len(parquet.scan_parquet(tmp_path / "in", spool, 1).splits["train"]) == 2


INNER = {f"n0000000{i}": tarred([(f"n0000000{i}_{j}.JPEG", IMAGES[j]) for j in range(2)]) for i in (1, 2)}
TRAIN = [(f"{synset}.tar", data) for synset, data in INNER.items()]
VAL = tarred([(f"ILSVRC2012_val_{i:08d}.JPEG", IMAGES[i]) for i in range(3)])
BASE = "ILSVRC2012_devkit_t12/data"


def mat(rows: list[tuple[Any, ...]], **how: Any) -> bytes:
    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    out = io.BytesIO()
    savemat(out, {"synsets": np.array(rows, dtype=fields)}, **how)
    return out.getvalue()


META = mat([(1, "n00000001", "a", 0), (2, "n00000002", "b", 0)])
TRUTH = b"1\n2\n1\n"


def kit(meta: bytes = META, truth: bytes = TRUTH) -> bytes:
    entries: Entries = [(f"{BASE}/meta.mat", meta), (f"{BASE}/ILSVRC2012_validation_ground_truth.txt", truth)]
    return gzip.compress(tarred(entries))


def mat_bomb() -> bytes:
    """Return a .mat file with a compressed element that decompresses to 96 MiB."""
    packed = zlib.compress(bytes(96 * 2**20), 1)
    return META[:128] + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed


KITS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"hello", "not a tar, or damaged"),
    "empty": (lambda: b"", "not a tar, or damaged"),
    "truncated": (lambda: kit()[:-200], "truncated"),
    "damaged gzip": (lambda: kit()[:50] + bytes(50) + kit()[100:], "damaged"),
    "gzip bomb": (lambda: gzip.compress(bytes(2**27), 1), "decompresses to more than 67,108,864 bytes"),
    "without its files": (lambda: gzip.compress(tarred([("x/readme", b"x")])), "no data/meta.mat in it"),
    "garbage in meta.mat": (lambda: kit(b"garbage" * 100), "data/meta.mat: damaged"),
    "meta.mat cut": (lambda: kit(META[:400]), "data/meta.mat: damaged"),
    "meta.mat without synsets": (lambda: kit(mat_of_x()), r"data/meta.mat: damaged \(KeyError"),
    "bomb in meta.mat": (lambda: kit(mat_bomb()), "data/meta.mat: decompresses to more than"),
    "numbers for names": (lambda: kit(mat([(1, 7, "a", 0), (2, "n2", "b", 0)])), "data/meta.mat: damaged"),
    "a class twice": (lambda: kit(mat([(1, "n1", "a", 0), (2, "n1", "b", 0)])), "contains class n1 twice"),
    "a number twice": (lambda: kit(mat([(1, "n1", "a", 0), (1, "n2", "b", 0)])), "contains class 1 twice"),
    "truth of letters": (lambda: kit(truth=b"a\nb\nc\n"), "b'a' is not a class number"),
    "truth not UTF-8": (lambda: kit(truth=b"\xff\xfe1\n"), "is not a class number"),
    "truth of huge numbers": (lambda: kit(truth=b"9" * 5000), "is not a class number"),
    "truth of other length": (lambda: kit(truth=b"1\n"), "has 3 images, but the development kit has labels of 1"),
    "truth of unknown classes": (lambda: kit(truth=b"1\n2\n3\n"), "which is not in the training tar"),
}


def mat_of_x() -> bytes:
    out = io.BytesIO()
    savemat(out, {"x": 1})
    return out.getvalue()


@pytest.mark.parametrize("name", KITS)
def test_invalid_development_kits_are_rejected(name: str, tmp_path: Path) -> None:
    make, message = KITS[name]
    source = tmp_path / "in"
    source.mkdir()
    (source / "ILSVRC2012_img_train.tar").write_bytes(tarred(list(TRAIN)))
    (source / "ILSVRC2012_img_val.tar").write_bytes(VAL)
    (source / ilsvrc.DEVKITS[0]).write_bytes(make())
    assert_rejected(source, tmp_path, message)


@pytest.mark.parametrize(("seed", "flips", "compressed"), [(22, 1, False), (1, 6, False), (2, 3, True)])
def test_a_damaged_meta_mat_is_read_or_raises_a_user_error(seed: int, flips: int, compressed: bool) -> None:
    """The first case crashes scipy with SIGSEGV."""
    draw = random.Random(seed)
    data = bytearray(mat([(1, "n00000001", "a", 0), (2, "n00000002", "b", 0)], do_compression=compressed))
    for _ in range(flips):
        data[draw.randrange(120, len(data))] = draw.randrange(256)
    try:
        ilsvrc._parse_devkit(Path("kit"), bytes(data), TRUTH)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


ILSVRC: dict[str, tuple[Entries, str]] = {
    "a class tar twice": ([*TRAIN, TRAIN[0]], "contains n00000001.tar twice"),
    "one class in two folders": ([(f"{d}/n00000001.tar", INNER["n00000001"]) for d in "xy"], "n00000001.tar twice"),
    "text for a class tar": ([TRAIN[0], ("n00000002.tar", b"hello" * 200)], "n00000002.tar: damaged at byte"),
    "a class of text": ([TRAIN[0], ("n00000002.tar", tarred([("a.txt", b"x")]))], "n00000002.tar: the class tar has"),
    "a class of a tar": ([TRAIN[0], ("n00000002.tar", tarred([("n3.tar", b"x")]))], "n00000002.tar: the class tar has"),
    "only resource forks": ([("._n00000002.tar", b"\0\5\x16\7" + bytes(600))], "no class tars in it"),
}


@pytest.mark.parametrize("name", ILSVRC)
def test_invalid_training_tars_are_rejected(name: str, tmp_path: Path) -> None:
    entries, message = ILSVRC[name]
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tarred(list(entries)))
    assert_rejected(tmp_path / "ILSVRC2012_img_train.tar", tmp_path, message)


def test_resource_forks_among_class_tars_are_ignored(tmp_path: Path) -> None:
    entries = [*TRAIN, ("._n00000002.tar", b"\0\5\x16\7" + bytes(600))]
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tarred(list(entries)))
    convert(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "set", ONE)
    assert [entry.folder for entry in ShardSet(tmp_path / "set").manifest.classes] == list(INNER)


def test_a_duplicate_validation_image_is_rejected(tmp_path: Path) -> None:
    """Labels are assigned in the order of file names."""
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tarred(list(TRAIN)))
    twice: Entries = [(f"{d}/ILSVRC2012_val_00000001.JPEG", IMAGES[0]) for d in "ab"]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tarred([*twice, ("b.JPEG", IMAGES[1])]))
    (tmp_path / ilsvrc.DEVKITS[0]).write_bytes(kit())
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000001\.JPEG twice, so the labels cannot be assigned"):
        convert(tmp_path, tmp_path / ".set", ONE)


SOLUTION = b"ImageId,PredictionString\n" + b"".join(b"v%d,n0000000%d 1 2 3 4\n" % (i, 1 + i % 2) for i in range(3))


def as_kaggle(root: Path, solution: bytes) -> Path:
    data = root / "ILSVRC/Data/CLS-LOC"
    for synset in INNER:
        (data / "train" / synset).mkdir(parents=True)
        (data / "train" / synset / "1.JPEG").write_bytes(IMAGES[0])
    (data / "val").mkdir()
    for i in range(3):
        (data / "val" / f"v{i}.JPEG").write_bytes(IMAGES[i])
    (root / "LOC_val_solution.csv").write_bytes(solution)
    return root


SOLUTIONS = {
    "not UTF-8": (SOLUTION + b"\xff\xfe,x\n", "not UTF-8 at byte"),
    "NUL": (SOLUTION + b"\0,x\n", "contains a NUL character"),
    "two classes for an image": (SOLUTION + b"v0,n00000002 1 2 3 4\n", "image v0 has two classes, n00000001 and n000"),
    "field beyond csv's limit": (SOLUTION + b"x," + b"y" * 200_000 + b"\n", "field larger than field limit"),
    "other columns": (b"a,b\n1,2\n", "expected a list ImageId,PredictionString"),
    "no prediction": (SOLUTION + b"v9,\n", "a row lacks one of the two fields"),
    "empty": (b"", "v0.JPEG: has no label in LOC_val_solution.csv"),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_invalid_kaggle_lists_are_rejected(name: str, tmp_path: Path) -> None:
    content, message = SOLUTIONS[name]
    assert_rejected(as_kaggle(tmp_path / "in", content), tmp_path, message)


def test_a_kaggle_list_with_a_byte_order_mark_and_a_repeated_line_is_read(tmp_path: Path) -> None:
    source = as_kaggle(tmp_path / "in", b"\xef\xbb\xbf" + SOLUTION + b"v0,n00000001 5 6 7 8\n")
    assert csv.field_size_limit() == 131_072, "the limit of the test above"
    convert(source, tmp_path / "set", ONE)
    assert len(ShardSet(tmp_path / "set").index("val")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n00000001 \xff\n", "not UTF-8 at byte 10"),
        (b"n00000001 a\0b\n", "contains a NUL character"),
        (b"n00000001 a\nn00000001 b\n", "contains class 'n00000001' twice"),
        (b"\n".join(b"%d" % i for i in range(101)), "has 101 classes; at most 100"),
    ],
)
def test_invalid_mapping_files_are_rejected(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "MAX_CLASSES", 100)
    source = as_kaggle(tmp_path / "in", SOLUTION)
    (source / "LOC_synset_mapping.txt").write_bytes(content)
    assert_rejected(source, tmp_path, f"LOC_synset_mapping.txt: {message}")


def test_reads_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(UserError, match="5 bytes, more than the 4"):
        read_bounded(path, 4)
    with pytest.raises(UserError, match="more than the 10 bytes"):
        read_bounded(Path("/proc/cpuinfo"), 10)
    with path.open("r+b") as file:
        file.truncate(2**43)
    with pytest.raises(UserError, match="more than the 100"):
        read_bounded(path, 100)


def special_files(folder: Path) -> dict[str, Path]:
    """Create a file of each type that is not a regular file, named like images."""
    os.mkfifo(folder / "fifo.jpg")
    socket.socket(socket.AF_UNIX).bind(str(folder / "s.jpg"))
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    return {path.stem: path for path in folder.iterdir()}


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the length of socket paths is limited
    for kind, path in special_files(Path()).items():
        with pytest.raises(NotRegular, match=f"{path}: a (fifo|socket|device|folder), not a regular file"):
            os.close(open_regular(path))
        assert kind in ("fifo", "s", "zero", "folder")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["image", "tar", "parquet", "mapping", "devkit"])
def test_special_files_in_a_source_never_block(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    (source / "a" / "1.jpg").write_bytes(IMAGES[0])
    if kind == "image":
        monkeypatch.chdir(source / "a")
        special_files(Path())
        os.mkfifo("fifo")
        (source / "a" / "kmsg.jpg").symlink_to("/proc/kmsg")
        (source / "a" / "cpu.jpg").symlink_to("/proc/cpuinfo")
        outcome = convert(source, tmp_path / "set", Options(max_rejects=0.7, scan=ScanOptions(workers=1)))
        assert outcome is not None
        reasons = [json.loads(line)["reason"] for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
        assert reasons == ["empty file"] * 2, "files in /proc have size 0 and are not read"
        assert sum(entry["count"] for entry in outcome.manifest.made["unused"]) == 4
        return
    if kind == "mapping":
        os.mkfifo(source / "synset_words.txt")
        assert_rejected(source, tmp_path, r"synset_words.txt: a fifo; expected a text file")
    elif kind == "devkit":
        (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tarred(list(TRAIN)))
        os.mkfifo(tmp_path / ilsvrc.DEVKITS[0])
        tar = tmp_path / "ILSVRC2012_img_train.tar"
        assert_rejected(tar, tmp_path, "devkit_t12.tar.gz: a fifo, not a regular file")
    else:
        (source / "a").rename(tmp_path / "away")
        os.mkfifo(source / f"x.{kind}")
        assert_rejected(source, tmp_path, rf"x\.{kind}: a fifo, not a regular file")


def class_folder(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    for i in range(4):
        (root / "a" / f"{i}.jpg").write_bytes(IMAGES[i])
    return root


SMALL = Options(shard_bytes=4000, scan=ScanOptions(workers=1))


def begin(source: Path, out: Path) -> None:
    """List the source and write the first of several shards."""
    convert(source, out, SMALL, ConversionPart(1, 4))
    assert len(list(out.glob("train-*.tar"))) == 1


@pytest.mark.timeout(60)
def test_a_file_that_is_replaced_by_a_fifo_after_the_listing_is_rejected(tmp_path: Path) -> None:
    source = class_folder(tmp_path / "in")
    begin(source, tmp_path / "set")
    for path in (source / "a").iterdir():
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"has changed .*: it can no longer be read .*'folder' \(.*in/a: .* images"):
        convert(source, tmp_path / "set", SMALL)
    listing, _ = WorkFolder(tmp_path / "set").load_listing("train")  # a worker that writes a shard has the old listing
    with (
        ContainerReader() as reader,
        pytest.raises(UserError, match=r"a/\d.jpg: was a regular file when .* listed, now a fifo; restore the source"),
    ):
        reader.read(next(listing.entries(0, 1)))


def test_files_modified_after_the_listing_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folder(tmp_path / "in")
    begin(source, tmp_path / "set")
    for path in (source / "a").iterdir():
        os.utime(path, (1, 1))
    assert convert(source, tmp_path / "set", SMALL) is not None
    assert "note: 3 files were modified after they were listed" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["time", "size"])
def test_an_archive_that_changed_after_the_listing_is_rejected(change: str, tmp_path: Path) -> None:
    """The listed offsets may no longer be those of the images."""
    source = tmp_path / "in"
    source.mkdir()
    tar = source / "a.tar"
    tar.write_bytes(tarred([(f"{i}.{s}", d) for i in range(4) for s, d in (("jpg", IMAGES[i]), ("cls", b"%d" % i))]))
    was = tar.stat()
    begin(source, tmp_path / "set")
    if change == "time":
        os.utime(tar, (1, 1))
    else:
        tar.write_bytes(tar.read_bytes() + bytes(512))
        os.utime(tar, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"the archive had .* bytes and was last modified at .*; restore the source"
    ) as caught:
        convert(source, tmp_path / "set", SMALL)
    assert caught.value.exit_code == 1
    tar.write_bytes(tar.read_bytes()[: was.st_size])
    os.utime(tar, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert convert(source, tmp_path / "set", SMALL) is not None


def test_huge_sizes_of_sparse_files_do_not_overflow(tmp_path: Path) -> None:
    """The sum of five sizes of 2^62 bytes overflows, and one shard per MiB would be 2^42 shards per file."""
    builder = ListingBuilder()
    names = [b"a/%d.jpg" % i for i in range(5)]
    builder.add_files(Container(tmp_path, 0, 0), [(name, 2**62, 0, 0) for name in names])
    listing, bounds = assign_to_shards(builder.build(), "train", seed=0, shard_bytes=2**20)
    assert len(listing) == 5
    assert bounds.tolist() == [0, 1, 2, 3, 4, 5]


def test_files_too_large_for_an_image_are_rejects(tmp_path: Path) -> None:
    source = class_folder(tmp_path / "in")
    with (source / "a" / "huge.jpg").open("wb") as file:
        file.truncate(2**43)
    outcome = convert(source, tmp_path / "set", Options(shard_bytes=2**20, max_rejects=0.5, scan=SMALL.scan))
    assert outcome is not None
    assert outcome.rejected == 1


def test_class_folders_with_the_same_displayed_name_are_rejected(tmp_path: Path) -> None:
    for name in (b"caf\xe9", rb"caf\xe9"):
        os.mkdir(bytes(tmp_path) + b"/" + name)
        (tmp_path / os.fsdecode(name) / "1.jpg").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"two class folders have names that are displayed as 'caf\\xe9'"):
        convert(tmp_path, tmp_path / ".set", ONE)


def test_control_characters_in_messages_are_escaped(tmp_path: Path) -> None:
    assert one_line("a\nb\x1b[2J\udcff\u2028\u202e") == r"a\nb\x1b[2J\udcff\u2028\u202e"
    assert one_line("naïve 猫\u3000犬 \U0001f600\u200d") == "naïve 猫\u3000犬 \U0001f600\u200d"
    assert str(UserError("/data/a\nerror: b")) == r"/data/a\nerror: b"


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
from pathlib import Path
from shards.convert.convert import Options, convert
from shards.errors import UserError
from shards.sources.scan import ScanOptions
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(scan=ScanOptions(workers=1)))
except UserError as error:
    print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    sys.exit(f"error: {{error}}")
"""


@pytest.mark.parametrize("name", ["long name of 1 GiB on disk", "label 50 million"])
def test_memory_for_invalid_tars_is_bounded(name: str, tmp_path: Path) -> None:
    """The process is limited to 3 GiB of address space, most of which numpy's threads and libraries reserve."""
    tar = tmp_path / "in" / "a.tar"
    tar.parent.mkdir()
    if name.startswith("long"):
        with tar.open("wb") as file:
            file.write(raw_header(b"././@LongLink", b"%011o\0" % (7 * 2**30), b"L"))
            file.truncate(2**33)
    else:
        tar.write_bytes(tarred(labeled(b"50000000")))
    driver = LIMITED.format(bytes=3 * 2**30)
    done = subprocess.run(
        [sys.executable, "-c", driver, tar.parent, tmp_path / "set"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    if name.startswith("long"):
        assert "a header of 7,516,192,768 bytes" in done.stderr
    else:
        assert "label 50000000 is out of range" in done.stderr
    # Not ru_maxrss: a new program inherits it from the process that started it, which is pytest after all other tests.
    assert int(done.stdout) < 2**21, "KiB"
    assert stat.S_ISREG(tar.stat().st_mode)
