"""Sets of shrunk images and of pixels have the samples, the plan and the crop windows of the set of original images."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment.params import crop_windows
from pipeline.augment.recipe import augment_recipe
from pipeline.plan import Position, TrainPlan
from shards.commands.command_line import Shard
from shards.convert import conversion_plan, pixel_size
from shards.convert.convert import convert
from shards.convert.options import Format
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.images.accept import accept
from shards.images.rules import ImageRules
from shards.images.shrink import target_size
from tests.support.sets_for_speed import (
    MADE_FOR_SPEED,
    SHORT_SIDE,
    contents,
    encoded,
    options,
    photos,
    sets,
    stored,
)

__all__ = ["photos", "sets"]  # fixtures


def decoded(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB"))


@pytest.mark.parametrize("name", MADE_FOR_SPEED)
def test_samples_labels_and_plan_are_those_of_the_original_set(name: str, sets: dict[str, Path]) -> None:
    original, fast = ShardSet(sets["original"]), ShardSet(sets[name])
    for split in ("train", "val"):
        assert np.array_equal(fast.index(split)["label"], original.index(split)["label"])
        assert list(fast.shard_samples(split)) == list(original.shard_samples(split))
        assert len(original.shard_samples("train")) > 2
    plans = [TrainPlan(one.shard_samples("train"), global_batch=8, seed=3) for one in (original, fast)]
    ids = [[plan.ids(Position(epoch, 1)).tolist() for epoch in range(3)] for plan in plans]
    assert ids[0] == ids[1]


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(SHORT_SIDE, 3000),
    width=st.integers(SHORT_SIDE, 3000),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 300),
)
def test_crop_windows_are_the_same_up_to_rounding(height: int, width: int, seed: int, epoch: int) -> None:
    """The window of a shrunk image is the shrunk window, within two pixels.

    The exception: a drawn window that fits only before or only after rounding, after which another one is drawn.
    """
    stored_width, stored_height = target_size(width, height, MADE_FOR_SPEED["shrunk"]) or (width, height)
    ids = np.arange(1000)

    def windows(height: int, width: int) -> NDArray[np.int32]:
        sizes = {"heights": np.full(len(ids), height), "widths": np.full(len(ids), width)}
        return crop_windows(augment_recipe("fat"), seed=seed, epoch=epoch, ids=ids, **sizes)

    scale = np.array([stored_height / height, stored_width / width] * 2)
    differ = np.abs(windows(height, width) * scale - windows(stored_height, stored_width)).max(axis=1)
    assert np.mean(differ > 2) < 0.015


@pytest.mark.parametrize("name", ["pixels", "shrunk pixels"])
def test_pixels_are_those_that_pillow_decodes_and_shrinks(name: str, sets: dict[str, Path]) -> None:
    jpegs, rows = stored(sets["original"]), ShardSet(sets[name]).index("train")
    lossless = ShardSet(sets["original"]).index("train")["repaired"] == 1
    assert np.count_nonzero(lossless) == 1
    gray = False
    for i, (jpeg, pixels) in enumerate(zip(jpegs, stored(sets[name]), strict=True)):
        image = Image.open(io.BytesIO(jpeg.tobytes()))
        gray |= image.mode == "L"
        size = (int(rows[i]["width"]), int(rows[i]["height"]))
        shrunk = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
        expected = np.asarray(shrunk.convert("RGB"))
        if lossless[i]:  # a PNG, whose pixels are stored without JPEG compression
            expected = np.full_like(expected, (200, 90, 30))
        assert np.array_equal(pixels.reshape(expected.shape), expected)
    assert gray, "gray images are stored as RGB"


def test_only_large_images_are_shrunk(sets: dict[str, Path]) -> None:
    rows = ShardSet(sets["original"]).index("train")
    short = np.minimum(rows["height"], rows["width"])
    assert (short <= SHORT_SIDE).any()
    for row, original, shrunk in zip(short, stored(sets["original"]), stored(sets["shrunk"]), strict=True):
        if row <= SHORT_SIDE:
            assert np.array_equal(original, shrunk), "the original bytes"
            continue
        assert min(decoded(shrunk).shape[:2]) == SHORT_SIDE
        _, _, colorspace, subsampling = simplejpeg.decode_jpeg_header(shrunk.tobytes())
        assert colorspace == "Gray" or subsampling == "420"


@pytest.mark.parametrize("name", MADE_FOR_SPEED)
def test_any_number_of_workers_writes_the_same_files(
    name: str, photos: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    convert(photos, tmp_path / "set", options(MADE_FOR_SPEED[name], workers=3))
    assert contents(tmp_path / "set") == contents(sets[name])


def test_the_manifest_describes_how_the_images_were_made(sets: dict[str, Path]) -> None:
    manifests = {name: ShardSet(path).manifest for name, path in sets.items()}
    made = {name: manifest.made for name, manifest in manifests.items()}
    assert {name: manifest.splits["train"].pixels for name, manifest in manifests.items()} == {
        "original": False,
        "shrunk": False,
        "pixels": True,
        "shrunk pixels": True,
    }
    assert '"pixels"' not in (sets["original"] / "dataset.json").read_text(), "readable by programs for sets of JPEGs"
    assert "libraries" not in made["original"]
    assert set(made["pixels"]["libraries"]) == {"Pillow", "simplejpeg"}
    assert {name: one.get("filter") for name, one in made.items()} == {
        "original": None,
        "shrunk": "hamming",
        "pixels": None,
        "shrunk pixels": "bicubic",
    }
    assert made["shrunk pixels"]["options"]["short_side"] == SHORT_SIDE
    assert made["shrunk pixels"]["options"]["pixels"] is True
    assert made["pixels"]["images"]["train"]["repaired"] == {"PNG": 1}


@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        ("shrunk pixels", ImageRules(short_side=224, pixels=True), "short_side was 256, now 224"),
        ("shrunk pixels", ImageRules(short_side=256), "pixels was True, now None"),
        ("shrunk", ImageRules(short_side=256, pixels=True), "pixels was None, now True"),
    ],
)
def test_a_conversion_with_other_options_is_not_resumed(
    first: str, second: ImageRules, complaint: str, photos: Path, sets: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=complaint):
        convert(photos, sets[first], options(second))


def test_a_conversion_is_resumed_with_the_same_versions_of_the_libraries(
    photos: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_join(photos, tmp_path / "set", MADE_FOR_SPEED["shrunk"])
    installed = conversion_plan.version
    monkeypatch.setattr(conversion_plan, "version", lambda name: "1.2" if name == "simplejpeg" else installed(name))
    with pytest.raises(UserError, match=r"was started with .*, but .* and simplejpeg 1\.2 are installed"):
        convert(photos, tmp_path / "set", options(MADE_FOR_SPEED["shrunk"]))
    monkeypatch.undo()
    convert(photos, tmp_path / "set", options(MADE_FOR_SPEED["shrunk"]))
    assert contents(tmp_path / "set") == contents(sets["shrunk"])


def fail_at_join(photos: Path, out: Path, rules: ImageRules) -> None:
    """Convert all shards, and stop before the manifest is written."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("shards.convert.convert.join", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(photos, out, options(rules))


@pytest.mark.parametrize("form", ["tar", "ffcv", "both"])
@pytest.mark.parametrize("headers", [10**6, 10])
def test_the_size_is_known_before_anything_is_written(
    form: Format, headers: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_size, "MAX_HEADERS", headers)
    expected: list[int] = []
    original = pixel_size.expect_bytes
    monkeypatch.setattr(
        "shards.convert.convert.expect_bytes", lambda *args: expected.append(original(*args)) or expected[0]
    )
    convert(photos, tmp_path / "set", options(MADE_FOR_SPEED["pixels"], form))
    written = sum(path.stat().st_size for path in (tmp_path / "set").iterdir() if path.suffix in (".tar", ".beton"))
    assert expected[0] == pytest.approx(written, rel=0.02 if headers > 100 else 0.4)


def test_the_size_is_printed_with_the_memory_that_caches_the_set(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Shard(photos, out=tmp_path / "set", pixels=True, short_side=64, workers=1).run() == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "the pixels of 41 images take about" in note
    assert "GiB are free for the page cache (this machine has" in note


def test_a_set_that_does_not_fit_on_the_disk_is_refused_and_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pixel_size.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"set: the pixels of 41 images take about 0\.02 GiB, but the disk has 0\.00"):
        convert(photos, tmp_path / "set", options(MADE_FOR_SPEED["pixels"]))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"check": "header"}, "--pixels --check header: pixels are decoded"),
        ({"write_mode": "smart"}, "--pixels --write-mode smart: --pixels stores pixels only"),
        ({"write_mode": "jpg"}, "--pixels --write-mode jpg: --pixels stores pixels only"),
    ],
)
def test_contradicting_options_are_rejected(
    option: dict[str, str], complaint: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        Shard(photos, out=tmp_path / "set", pixels=True, **option).run()  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_an_orientation_is_recorded_and_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = accept(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif), ImageRules(pixels=True))
    assert (image.height, image.width, image.orientation, len(image.data)) == (20, 30, 6, 30 * 20 * 3)
