"""Pixels in tars (KEY.ppm) are read by this project and by other libraries, and damage to them is found."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch, EvalLoader, TrainLoader
from pipeline.look import Look
from pipeline.plan import EvalPlan, TrainPlan
from pipeline.storage.placement import open_storage
from pipeline.storage.quick_check import quick_check
from pipeline.storage.reader import SampleReader
from pipeline.storage.remote.shard_set import open_set
from shards.commands.index_tars import index_tars
from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Format
from shards.errors import ConversionFailed, ShardSetError, UserError
from shards.format.dataset import ShardSet
from shards.images.ppm import ppm_header
from shards.images.rules import ImageRules
from tests.support.damage import edit_index
from tests.support.serving import serve
from tests.support.sets_for_speed import MADE_FOR_SPEED, flip, options, photos, sets, stored

__all__ = ["photos", "sets"]  # fixtures


def read_by_tarfile(tars: list[Path]) -> list[tuple[bytes, int]]:
    found = []
    for path in tars:
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = [name.removesuffix(".ppm") for name in content if name.endswith(".ppm")]
        found += [(pixels_of(content[f"{key}.ppm"]), int(content[f"{key}.cls"])) for key in keys]
    return found


def read_by_webdataset(tars: list[Path]) -> list[tuple[bytes, int]]:
    import webdataset

    dataset = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
    return [(image.tobytes(), label) for image, label in dataset.decode("rgb8").to_tuple("ppm", "cls")]


def read_by_dali(tars: list[Path]) -> list[tuple[bytes, int]]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        indexes = [str(path.with_suffix(".idx")) for path in tars]
        encoded, label = fn.readers.webdataset(
            paths=[str(path) for path in tars], index_paths=indexes, ext=["ppm", "cls"], name="reader"
        )
        return fn.decoders.image(encoded, device="cpu"), label

    pipeline = read()
    pipeline.build()
    batches = [pipeline.run() for _ in range(pipeline.epoch_size("reader"))]
    return [(images.at(0).tobytes(), int(bytes(labels.at(0)))) for images, labels in batches]


def pixels_of(ppm: bytes) -> bytes:
    with Image.open(io.BytesIO(ppm)) as image:
        assert image.format == "PPM"
        return image.tobytes()


@pytest.mark.parametrize("read", [read_by_tarfile, read_by_webdataset, read_by_dali])
def test_other_libraries_read_the_pixels(
    read: Callable[[list[Path]], list[tuple[bytes, int]]], sets: dict[str, Path]
) -> None:
    shard_set = ShardSet(sets["pixels"])
    tars = [shard_set.shard_path("train", i) for i in range(len(shard_set.split("train").shards))]
    labels = shard_set.index("train")["label"].tolist()
    expected = [pixels.tobytes() for pixels in stored(sets["pixels"])]
    assert read(tars) == list(zip(expected, labels, strict=True))


def test_a_batch_of_pixels_has_no_headers(sets: dict[str, Path]) -> None:
    shard_set = ShardSet(sets["shrunk pixels"])
    with SampleReader(open_storage(shard_set, "train")) as reader:
        batch = reader.read(np.array([5, 0, 9])).checked()
        assert quick_check(shard_set, "train", reader) == len(shard_set.shard_samples("train"))
    assert batch.raw.all()
    assert [len(image) for image in batch.images] == [3 * int(r["height"]) * int(r["width"]) for r in batch.rows]
    with SampleReader(open_storage(ShardSet(sets["shrunk"]), "train")) as reader:
        assert not reader.read(np.arange(20)).raw.any()


def test_training_and_evaluation_images_equal_those_from_jpegs(sets: dict[str, Path]) -> None:
    png = np.flatnonzero(ShardSet(sets["original"]).index("train")["repaired"])  # its pixels differ from its JPEG
    recipe, cpu = augment_recipe("light", size=48), torch.device("cpu")

    def batches(name: str) -> tuple[list[Batch], list[Batch]]:
        dataset = ShardSet(sets[name])
        plan = TrainPlan(dataset.shard_samples("train"), global_batch=8, seed=1)
        with TrainLoader(dataset, plan, BatchShape(global_batch=8), recipe, epochs=2, device=cpu) as loader:
            trained = list(loader.stream())
        evaluation = EvalPlan(dataset.split("val").samples, batch=8)
        with EvalLoader(dataset, evaluation, size=48, mean=recipe.mean, std=recipe.std, device=cpu) as loader:
            return trained, list(loader)

    for found, expected, excluded in zip(batches("pixels"), batches("original"), (png, []), strict=True):
        for pixels, jpegs in zip(found, expected, strict=True):
            assert pixels.ids.tolist() == jpegs.ids.tolist()
            rows = ~np.isin(jpegs.ids, excluded)
            assert torch.equal(pixels.images[rows], jpegs.images[rows])


def test_look_shows_stored_pixels(sets: dict[str, Path], tmp_path: Path) -> None:
    assert Look(str(sets["shrunk pixels"]), out=tmp_path / "sheet.png", count=4, size=64, diff=True).run() == 0
    assert Image.open(tmp_path / "sheet.png").height > 128


def test_a_damaged_pixel_is_a_bad_sample_with_its_key(sets: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sets["pixels"], tmp_path / "set")
    row = ShardSet(tmp_path / "set").index("train")[4]
    with tarfile.open(ShardSet(tmp_path / "set").shard_path("train", int(row["shard"]))) as tar:
        header = len(ppm_header(int(row["height"]), int(row["width"])))
        (key,) = [member.name[:-4] for member in tar if member.offset_data + header == row["offset"]]
    flip(ShardSet(tmp_path / "set").shard_path("train", int(row["shard"])), int(row["offset"]) + 1000)
    with SampleReader(open_storage(ShardSet(tmp_path / "set"), "train")) as reader:
        (fault,) = reader.read(np.array([3, 4, 5])).faults
    assert str(fault.error).endswith(f"(sample 4, key {key})")


@pytest.mark.parametrize(
    ("part", "complaint"),
    [("pixel", "the image differs from the one that was written"), ("ppm header", "damaged header of a PPM")],
)
def test_verify_locates_a_changed_bit(part: str, complaint: str, sets: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sets["shrunk pixels"], tmp_path / "set")
    shard_set = ShardSet(tmp_path / "set")
    row = shard_set.index("train")[7]
    path, at = shard_set.shard_path("train", int(row["shard"])), int(row["offset"])
    member = at - len(ppm_header(int(row["height"]), int(row["width"])))
    flip(path, at + 12_345 if part == "pixel" else member + 4)
    (fault,) = verify(tmp_path / "set", workers=1)
    assert fault.startswith(f"{path}: offset {member - 512}, key '")
    assert fault.endswith(complaint)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_reported_with_its_file(sets: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    pristine = sets["shrunk pixels"]
    name = data.draw(st.sampled_from(["train-000000.tar", "train-000000.idx", "dataset.json", "val.index.npy"]))
    at = data.draw(st.integers(0, (pristine / name).stat().st_size - 1))
    victim = tmp_path / "changed"
    shutil.rmtree(victim, ignore_errors=True)
    victim.mkdir()
    for path in pristine.iterdir():
        (victim / path.name).hardlink_to(path)
    (victim / name).unlink()
    shutil.copyfile(pristine / name, victim / name)
    flip(victim / name, at)
    try:
        faults = verify(victim, workers=1)
    except ShardSetError as error:
        faults = [str(error)]
    assert any(name in fault for fault in faults)


def test_an_index_with_another_size_than_that_of_the_pixels_is_rejected(sets: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sets["pixels"], tmp_path / "set")
    edit_index(tmp_path / "set", lambda index: index["size"].__setitem__(3, index["size"][3] - 3))
    with pytest.raises(ShardSetError, match=r"row 3 has size .*, expected 3 bytes per pixel"):
        ShardSet(tmp_path / "set").index("train")


def test_a_remote_set_of_pixels_is_read_and_verified(sets: dict[str, Path], tmp_path: Path) -> None:
    with serve(sets["shrunk pixels"]) as site:
        remote = open_set(site.url, cache=tmp_path)
        with SampleReader(open_storage(remote, "val")) as reader:
            batch = reader.read(np.arange(remote.split("val").samples)).checked()
    assert batch.raw.all()
    for pixels, expected in zip(batch.images, stored(sets["shrunk pixels"], "val"), strict=True):
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("form", ["ffcv", "both"])
def test_a_beton_stores_the_same_pixels(form: Format, photos: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    convert(photos, tmp_path / "set", options(MADE_FOR_SPEED["shrunk pixels"], form))
    assert verify(tmp_path / "set", workers=1) == []
    for pixels, expected in zip(stored(tmp_path / "set", beton=True), stored(sets["shrunk pixels"]), strict=True):
        assert np.array_equal(pixels, expected)
    entry = ShardSet(tmp_path / "set").split("train")
    assert entry.pixels == (form == "both")
    assert entry.beton is not None
    assert entry.beton.mode == "raw"


def tar_of(path: Path, images: dict[str, bytes]) -> Path:
    """Write a WebDataset tar with these images, all of class 0 or 1."""
    with tarfile.open(path, "w") as tar:
        for number, (name, image) in enumerate(images.items()):
            for member, data in ((name, image), (f"{name[:-4]}.cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def image(seed: int, size: tuple[int, int] = (31, 22)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def test_tars_of_pixels_are_indexed_in_place(sets: dict[str, Path], tmp_path: Path) -> None:
    for path in sets["pixels"].glob("*.tar"):
        shutil.copy(path, tmp_path)
    index_tars(sorted(tmp_path.glob("*.tar")), ImageRules(), workers=1)
    indexed, original = ShardSet(tmp_path).index("train"), ShardSet(sets["pixels"]).index("train")
    for column in ("offset", "hash", "shard", "size", "label", "height", "width"):
        assert np.array_equal(indexed[column], original[column])
    assert verify(tmp_path, workers=1) == []
    flip(tmp_path / "train-000000.tar", int(indexed[0]["offset"]) + 50)
    (fault,) = verify(tmp_path, workers=1)
    assert fault.endswith("the image differs from the indexed one")


def test_a_set_of_pixels_is_a_source_of_the_same_pixels(sets: dict[str, Path], tmp_path: Path) -> None:
    convert(sets["pixels"], tmp_path / "set", options(MADE_FOR_SPEED["pixels"]))
    found, expected = ([image.tobytes() for image in stored(path)] for path in (tmp_path / "set", sets["pixels"]))
    assert sorted(found) == sorted(expected)


def test_pixels_of_other_programs_are_indexed(tmp_path: Path) -> None:
    pictures = {f"long/{'k' * 120}{i}.ppm": image(i) for i in range(4)}
    tar_of(tmp_path / "train.tar", {name: encoded(picture, "PPM") for name, picture in pictures.items()})
    index_tars([tmp_path / "train.tar"], ImageRules(), workers=1)
    assert [pixels.tobytes() for pixels in stored(tmp_path)] == [picture.tobytes() for picture in pictures.values()]
    flip(tmp_path / "train.tar", int(ShardSet(tmp_path).index("train")[2]["offset"]) + 50)
    with SampleReader(open_storage(ShardSet(tmp_path), "train")) as reader:
        (fault,) = reader.read(np.arange(4)).faults
    assert str(fault.error).endswith(f"(sample 2, key long/{'k' * 120}2)")


def test_a_split_has_only_jpegs_or_only_pixels(tmp_path: Path) -> None:
    jpeg, ppm = encoded(image(0), "JPEG"), encoded(image(1), "PPM")
    both = tar_of(tmp_path / "train.tar", {"a.jpg": jpeg, "b.ppm": ppm})
    with pytest.raises(UserError, match=r"train\.tar: has both JPEGs and pixels \(KEY\.ppm\)"):
        index_tars([both], ImageRules(), workers=1)
    two = [tar_of(tmp_path / "train-0.tar", {"a.jpg": jpeg}), tar_of(tmp_path / "train-1.tar", {"b.ppm": ppm})]
    with pytest.raises(UserError, match=r"split 'train' \(train-0\.tar, train-1\.tar\) have both JPEGs and pixels"):
        index_tars(two, ImageRules(), workers=1)
    two[1].rename(tmp_path / "val-1.tar")
    manifest = index_tars([two[0], tmp_path / "val-1.tar"], ImageRules(), workers=1)
    assert {name: split.pixels for name, split in manifest.splits.items()} == {"train": False, "val": True}


@pytest.mark.parametrize(
    "header", [b"P6 31 22 255\n", b"P6\n# comment\n31 22\n255\n", b"P6\n31 23\n255\n", b"P6\n031 22\n255\n"]
)
def test_pixels_with_another_header_are_rejected(header: bytes, tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "train.tar", {"a.ppm": header + image(0).tobytes(), "b.ppm": encoded(image(1), "PPM")})
    with pytest.raises(ConversionFailed, match="1 of 2 images rejected"):
        index_tars([tar], ImageRules(), workers=1)
