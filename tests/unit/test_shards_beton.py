"""FFCV reads every sample of a .beton file once, in the order of the set, in every write mode."""

from __future__ import annotations

import importlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shards.commands.command_line import SampleDigits, SamplePhotos
from shards.commands.verify import verify
from shards.convert.convert import ConversionPart, convert, finish
from shards.convert.options import Format, Options
from shards.convert.work_folder import WorkFolder
from shards.errors import ShardSetError
from shards.format.beton import ALLOCATION, FIELD, HEADER, IMAGE, METADATA, BetonOptions, WriteMode, compute_layout
from shards.format.dataset import ShardSet
from shards.format.index import INDEX_DTYPE, Index
from shards.sources.scan import ScanOptions

ffcv = importlib.import_module if os.environ.get("CI") == "true" else pytest.importorskip
reader = ffcv("ffcv.reader")


def options(form: Format, mode: WriteMode = "jpg") -> Options:
    return Options(
        shard_bytes=1_500_000,
        format=form,
        beton=BetonOptions(mode=mode, smart_ratio=5.0),
        scan=ScanOptions(workers=1),
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beton") / "photos"
    SamplePhotos(folder, count=60).run()
    return folder


@pytest.fixture(scope="module")
def tars(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("beton") / "tars"
    convert(photos, out, options("tar"))
    return ShardSet(out)


def jpegs(shard_set: ShardSet) -> list[bytes]:
    rows = shard_set.index("train")
    return [shard_set.shard_path("train", row["shard"]).read_bytes()[row["offset"] :][: row["size"]] for row in rows]


def stored(path: Path) -> list[tuple[int, bytes, tuple[int, int], int]]:
    """Return (mode, bytes, (width, height), label) of every sample, read with FFCV's data structures."""
    found = reader.Reader(path)
    data = path.read_bytes()
    size_at = dict(zip(found.alloc_table["ptr"], found.alloc_table["size"], strict=True))
    rows = []
    for image, label in found.metadata:
        pointer = int(image["data_ptr"])
        content = data[pointer : pointer + int(size_at[pointer])]
        assert pointer // found.page_size == (pointer + len(content) - 1) // found.page_size, "within one page"
        rows.append((int(image["mode"]), content, (int(image["width"]), int(image["height"])), int(label)))
    assert found.field_names == ["image", "label"]
    assert list(found.alloc_table["sample_id"]) == list(range(found.num_samples))
    return rows


def test_the_record_types_are_those_of_ffcv() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    for ours, theirs in (
        (HEADER, types.HeaderType),
        (FIELD, types.FieldDescType),
        (ALLOCATION, types.ALLOC_TABLE_TYPE),
        (IMAGE, RGBImageField().metadata_type),
        (METADATA, types.get_metadata_type([RGBImageField(), IntField()])),
    ):
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[name][1] for name in ours.names] == [theirs.fields[name][1] for name in theirs.names]


@pytest.mark.parametrize("form", ["ffcv", "both"])
@pytest.mark.parametrize("mode", ["jpg", "raw", "smart"])
def test_ffcv_reads_every_sample_in_the_order_of_the_set(
    form: Format, mode: WriteMode, photos: Path, tars: ShardSet, tmp_path: Path
) -> None:
    convert(photos, tmp_path / "set", options(form, mode))
    shard_set = ShardSet(tmp_path / "set")
    index = tars.index("train")
    rows = stored(tmp_path / "set" / "train.beton")
    assert [row[3] for row in rows] == list(index["label"])
    raw = 0
    for (kind, content, size, _), encoded, row in zip(rows, jpegs(tars), index, strict=True):
        assert size == (row["width"], row["height"])
        if kind == 0:
            assert content == encoded, "the original bytes"
        else:
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = np.frombuffer(content, np.uint8).reshape(size[1], size[0], 3)
                assert np.abs(pixels.astype(int) - np.asarray(image.convert("RGB"))).max() <= 2
            raw += 1
    assert {"jpg": raw == 0, "raw": raw == len(rows), "smart": 0 < raw < len(rows)}[mode]
    assert (tmp_path / "set" / "train-000000.tar").exists() == (form == "both")
    assert list(shard_set.shard_samples("train")) == list(tars.shard_samples("train")), "one plan is valid for both"
    shard_set.check_sizes("train")
    assert verify(tmp_path / "set", workers=1) == []


def test_a_set_with_only_a_beton_is_read_through_its_index(photos: Path, tars: ShardSet, tmp_path: Path) -> None:
    convert(photos, tmp_path / "set", options("ffcv"))
    assert jpegs(ShardSet(tmp_path / "set")) == jpegs(tars)


def test_ffcvs_loader_decodes_the_file(tmp_path: Path) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    SampleDigits(tmp_path / "digits").run()
    convert(tmp_path / "digits", tmp_path / "set", options("both"))
    loader = Loader(
        tmp_path / "set" / "val.beton",
        batch_size=120,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    index = ShardSet(tmp_path / "set").index("val")
    assert list(np.concatenate([labels for _, labels in batches]).ravel()) == list(index["label"])
    images = np.concatenate([images for images, _ in batches])
    tar = (tmp_path / "set" / "val-000000.tar").read_bytes()
    for row, image in zip(index, images, strict=True):
        encoded = tar[row["offset"] :][: row["size"]]
        assert np.array_equal(image, simplejpeg.decode_jpeg(encoded, "RGB", fastdct=True)), "FFCV uses the fast DCT"


@pytest.mark.parametrize("form", ["ffcv", "both"])
def test_resumed_and_joined_conversions_write_the_same_bytes(form: Format, photos: Path, tmp_path: Path) -> None:
    """In parts; interrupted in the middle of the .beton; interrupted just before the manifest."""
    convert(photos, tmp_path / "reference", options(form))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "reference").iterdir()}
    out = tmp_path / "set"
    for k in (1, 2):
        convert(photos, out, options(form), ConversionPart(k, 2))
    work = WorkFolder(out, keeps_tars=form == "both")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(out, snapshot)
    finish(out, workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected

    shutil.rmtree(out)
    shutil.copytree(snapshot, out)
    from shards.convert.write_beton import write_betons

    shards = [i for split, i in work.load_plan().jobs if split == "train"]  # type: ignore[union-attr]
    write_betons(work, {"train": shards}, BetonOptions(), workers=1)
    if form == "both":  # as if killed while the second segment was written
        (out / "train.beton").rename(out / ".making" / "train.beton")
        (out / ".making" / "train-000001.beton").unlink()
        with (out / ".making" / "train.beton").open("r+b") as file:
            file.seek(int(work.load_segment("train", 2)[1]["offset"][0]) - 10_000)
            file.write(b"garbage")
    convert(photos, out, options(form))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


@pytest.mark.parametrize("form", ["ffcv", "both"])
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_damage_is_detected_and_located(form: Format, mode: WriteMode, photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "set", options(form, mode))
    path = tmp_path / "set" / "train.beton"
    data = bytearray(path.read_bytes())
    found = reader.Reader(path)
    image_at = int(found.metadata[20][0]["data_ptr"]) + 50
    for at, complaint in (
        (4, "damaged header or metadata"),
        (3000, "damaged header or metadata"),
        (image_at, f"offset {image_at - 50}, sample 20"),
        (len(data) - 1, "damaged allocation table"),
    ):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        (fault,) = verify(tmp_path / "set", workers=1)
        assert fault.startswith(f"{path}: ")
        assert complaint in fault
    path.write_bytes(data[:-9])
    (fault,) = verify(tmp_path / "set", workers=1)
    assert fault.endswith("truncated")
    with pytest.raises(ShardSetError, match=r"train\.beton: .* truncated"):
        ShardSet(tmp_path / "set").check_sizes("train")
    path.unlink()
    (fault,) = verify(tmp_path / "set", workers=1)
    assert fault.endswith("train.beton: missing")


def rows(sizes: list[int], shards: list[int], side: int = 10) -> Index:
    index = np.zeros(len(sizes), INDEX_DTYPE)
    index["size"], index["shard"], index["height"], index["width"] = sizes, shards, side, side
    return index


def test_pages_grow_to_the_size_of_the_largest_image() -> None:
    layout = compute_layout(rows([100, 20_000_000, 100], [0, 0, 1]), BetonOptions())
    assert layout.page == 2**25
    assert list(layout.offsets // layout.page) == [1, 1, 1]


def test_an_image_that_does_not_fit_starts_a_new_page() -> None:
    page = 2**23
    layout = compute_layout(rows([page - 10, 11, page, 5], [0, 0, 1, 1]), BetonOptions())
    assert list(layout.offsets) == [page, 2 * page, 3 * page, 4 * page]
    assert list(layout.starts) == [page, 2 * page + 11, 4 * page + 5]
