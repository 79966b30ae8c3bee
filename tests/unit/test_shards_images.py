"""Every kind of image is kept, re-encoded, rejected, or not used, as docs/converting.md specifies."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401
import pytest
import xxhash
from PIL import Image

from shards.commands.index_tars import index_tars
from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.format.dataset import ShardSet
from shards.images.accept import accept
from shards.images.jpeg import count_scans, parse_header
from shards.images.limits import MAX_PIXELS
from shards.images.rules import ImageRules, Rejected
from shards.sources.listing import sample_key
from tests.support.decompression_bombs import IMAGES, progressive_jpeg
from tests.support.measured import run_measured

RULES = ImageRules()


def photo(mode: str = "RGB", size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Return smooth waves with some noise, which compress like a photo."""
    y, x = np.mgrid[: size[1], : size[0]]
    grain = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1) * 90 + 128
    return Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def with_ycck_marker(cmyk: bytes) -> bytes:
    """Mark a CMYK JPEG as YCCK in its Adobe marker (transform 2)."""
    at = cmyk.index(b"Adobe")
    return cmyk[: at + 11] + b"\x02" + cmyk[at + 12 :]


JPEG = encoded(photo(), quality=90)
# Entropy-coded bytes in the middle are replaced by bytes that contain no marker.
DAMAGED = JPEG[: len(JPEG) // 2] + bytes(range(64)) + JPEG[len(JPEG) // 2 + 64 :]
DEEP = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))
FRAMES = [photo(size=(64, 48)), photo(size=(64, 48)).transpose(Image.Transpose.ROTATE_180)]

KEPT = {
    "baseline.JPEG": JPEG,
    "gray.jpg": encoded(photo("L")),
    "progressive.jpg": encoded(photo(), progressive=True),
    "progressive gray.jpg": encoded(photo("L"), progressive=True),
    "twelve_megapixels.jpg": encoded(photo().resize((4000, 3000))),
    "rotated_by_exif.jpg": encoded(photo(), exif=oriented(6)),
    "trailing_garbage.jpg": JPEG + b"garbage" * 99,
    "one_pixel.jpg": encoded(photo(size=(1, 1))),
    "long_and_thin.jpg": encoded(photo(size=(10000, 20))),
    "no_suffix": JPEG,
    "with  spaces and (brackets).jpg": JPEG,
    "ünïcödé 图像.jpg": JPEG,
    "图像.jpg": JPEG,
    "two.dots.jpg": JPEG,
}
REENCODED = {
    "cmyk.jpg": encoded(photo("CMYK")),
    "ycck.jpg": with_ycck_marker(encoded(photo("CMYK"))),
    "png_named.JPEG": encoded(photo(), "PNG"),
    "with_alpha.png": encoded(photo("RGBA"), "PNG"),
    "palette_with_transparency.png": encoded(photo("P"), "PNG", transparency=0),
    "sixteen_bits.png": encoded(DEEP, "PNG"),
    "two_levels.png": encoded(photo("1"), "PNG"),
    "a.webp": encoded(photo(), "WEBP"),
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "a.bmp": encoded(photo(), "BMP"),
    "damaged_in_the_middle.jpg": DAMAGED,
    "extended_sequential.jpg": JPEG.replace(b"\xff\xc0", b"\xff\xc1", 1),
    "stray_bytes_in_the_header.jpg": JPEG[:20] + bytes(7) + JPEG[20:],
}
REJECTED = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": encoded(photo(), "PNG")[:2000],
    "empty.jpg": b"",
    "text.jpg": b"This is a text.\n" * 9,
    "header_only.jpg": JPEG[:300],
    "a_billion_pixels.jpg": JPEG.replace(
        struct.pack(">HH", 120, 160), struct.pack(">HH", 40000, 40000)
    ),  # in the header only
}
IGNORED = {
    "Thumbs.db": b"\xd0\xcf\x11\xe0" * 9,
    "notes.txt": b"hello",
    "._baseline.JPEG": b"\0\5\x16\7" * 9,
    ".trashed-1700000000-a.jpg": JPEG,  # a photo deleted on Android
}


@pytest.mark.parametrize("name", KEPT)
def test_standard_jpegs_are_kept_byte_for_byte(name: str) -> None:
    image = accept(KEPT[name], RULES)
    assert image.data == KEPT[name]
    assert image.repair is None
    with Image.open(io.BytesIO(KEPT[name])) as reference:
        assert (image.width, image.height) == reference.size
        assert image.orientation == reference.getexif().get(0x0112, 1)


@pytest.mark.parametrize("name", REENCODED)
def test_other_images_are_reencoded_as_standard_jpegs_of_the_same_image(name: str) -> None:
    image = accept(REENCODED[name], RULES)
    assert image.repair
    header = parse_header(image.data)
    assert header.is_standard
    assert (header.height, header.width) == (image.height, image.width)
    with Image.open(io.BytesIO(image.data)) as result, Image.open(io.BytesIO(REENCODED[name])) as source:
        assert result.size == source.size
        assert result.mode in ("L", "RGB")
        if name != "sixteen_bits.png":  # Pillow clips these; tested below
            difference = np.abs(np.int32(result.convert("RGB")) - np.int32(on_white(source))).mean()
            assert difference < 4  # levels of 255
    assert accept(image.data, RULES).data == image.data, "a re-encoded image is not re-encoded again"


def on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def test_upper_8_of_16_bits_are_kept() -> None:
    with Image.open(io.BytesIO(accept(REENCODED["sixteen_bits.png"], RULES).data)) as result:
        assert np.abs(np.int32(result) - np.int32(np.asarray(DEEP) >> 8)).max() <= 6


def test_transparent_pixels_are_composited_onto_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    with Image.open(io.BytesIO(accept(encoded(clear, "PNG"), RULES).data)) as result:
        assert np.asarray(result).min() > 250


@pytest.mark.parametrize("name", REJECTED)
def test_images_that_do_not_decode_are_rejected_with_the_reason(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        accept(REJECTED[name], RULES)
    expected = {"empty.jpg": "empty file", "text.jpg": "not an image", "a_billion_pixels.jpg": "too large"}
    assert expected.get(name, "does not decode") in str(caught.value)


def test_too_large_images_are_rejected_before_decoding() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(Rejected, match=f"too large: {side}x{side}"):
        accept(encoded(Image.new("1", (side, side)), "PNG"), RULES)


def test_decompression_bombs_are_rejected_before_they_cost_memory_or_time() -> None:
    """The process is limited to 30 s of CPU time and 100 MiB in addition to its imports."""
    code = """
        import json, resource
        from shards.images.accept import ImageRules, Rejected, accept
        from tests.support.decompression_bombs import IMAGES
        bombs = {name: bomb.make() for name, bomb in IMAGES.items()}
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        measure()
        reasons = {}
        for name, data in bombs.items():
            for check in ("decode", "header"):
                try:
                    reasons[name] = f"accepted: {accept(data, ImageRules(check=check)).repair}"
                except Rejected as error:
                    reasons[name] = str(error)
        print(json.dumps([grown(), reasons]))
    """
    peak, reasons = json.loads(run_measured(code))
    assert peak < 100 * 2**20
    for name, bomb in IMAGES.items():
        assert re.search(bomb.reason, reasons[name]), (name, reasons[name])


def test_decoding_needs_no_more_memory_than_the_estimate() -> None:
    """The estimate is 9 bytes per pixel; with copies of the whole image it would be 30."""
    code = """
        from shards.images.accept import ImageRules, accept
        from tests.support.decompression_bombs import png
        for color_type, depth in ((0, 16), (6, 16), (2, 8)):
            data = png(2500, 2500, color_type, depth)
            for rules in (ImageRules(), ImageRules(max_side=2400)):
                measure()
                accept(data, rules)
                print(grown())
    """
    assert max(map(int, run_measured(code).split())) < 6_250_000 * 9 + 24 * 2**20, "24 MiB for bands"


@pytest.mark.parametrize(
    ("kind", "options", "per_pixel"),
    [
        ("AVIF", {"speed": 10, "subsampling": "4:4:4"}, 24),
        ("HEIF", {"quality": 50}, 24),
        ("JXL", {"effort": 1}, 24),
        ("JPEG2000", {}, 7 * 4 + 6),
    ],
)
def test_newer_formats_need_no_more_memory_than_the_estimate(
    kind: str, options: dict[str, object], per_pixel: int, tmp_path: Path
) -> None:
    pillow_heif.register_heif_opener()
    (tmp_path / "image").write_bytes(encoded(photo("RGBA").resize((1600, 1000)), kind, **options))
    code = f"""
        from pathlib import Path
        from shards.images.accept import ImageRules, accept
        data = Path("{tmp_path}/image").read_bytes()
        measure()
        accept(data, ImageRules())
        print(grown())
    """
    assert int(run_measured(code)) < 1_600_000 * per_pixel + 24 * 2**20, "24 MiB for bands and libraries"


def test_index_and_verify_enforce_the_same_limits_as_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pipeline index` rejects the bomb; `pipeline verify` reports it in a set that was indexed without limits."""
    tar = tmp_path / "train-0.tar"
    with tarfile.open(tar, "w") as file:
        for name, data in {
            "a.jpg": JPEG,
            "a.cls": b"0",
            "b.jpg": IMAGES["jpeg of 1000 scans"].make(),
            "b.cls": b"0",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    for check in ("decode", "header"):
        assert index_tars([tar], ImageRules(check=check), max_rejects=1.0).splits["train"].samples == 1
        reject = json.loads((tmp_path / "rejects.jsonl").read_text())
        assert reject["image"] == "train-0.tar/b.jpg"
        assert "more than 20 scans of 9990x9990" in reject["reason"]
        assert verify(tmp_path) == []
        for made in ("dataset.json", "train.index.npy", "rejects.jsonl"):
            (tmp_path / made).unlink()
    with monkeypatch.context() as patched:
        for name in ("MAX_SCANS", "MAX_SCAN_PIXELS"):
            patched.setattr(f"shards.images.accept.{name}", 10**15)
        assert index_tars([tar], ImageRules(check="header")).splits["train"].samples == 2
    (fault,) = verify(tmp_path)
    assert re.search(r"train-0\.tar: offset \d+: .* would reject it: .* more than 20 scans of 9990x9990", fault)


def test_small_jpegs_with_many_scans_are_reencoded() -> None:
    image = accept(progressive_jpeg(64, 48, 1000), RULES)
    assert image.repair == "JPEG with more than 64 scans"
    assert not parse_header(image.data).multiscan
    assert (image.width, image.height) == (64, 48)
    assert accept(progressive_jpeg(64, 48, 1000), ImageRules(check="header")).repair


def test_data_after_the_image_is_not_counted_as_scans() -> None:
    """Thumbnails, appended images, and other bytes after the end may contain the marker of a scan."""
    data = encoded(photo(), progressive=True) + b"\xff\xda" * 1000
    assert accept(data, RULES).data == data
    header = parse_header(data)
    assert count_scans(data, header, 100) == 10, "libjpeg's default script for color images"


def test_conversion_in_bands_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("with_alpha.png", "palette_with_transparency.png", "sixteen_bits.png", "two_levels.png", "cmyk.jpg")
    whole = [accept(REENCODED[name], RULES).data for name in names]
    rules = [ImageRules(max_side=side) for side in (1, 17, 99, 159)]
    images = [*(REENCODED[name] for name in names), JPEG, KEPT["gray.jpg"], KEPT["long_and_thin.jpg"]]
    shrunk = [accept(data, rule).data for data in images for rule in rules]
    for module in ("shrink", "pixels"):
        monkeypatch.setattr(f"shards.images.{module}.BAND_PIXELS", 1000)
    assert [accept(REENCODED[name], RULES).data for name in names] == whole
    assert [accept(data, rule).data for data in images for rule in rules] == shrunk


def test_the_orientation_of_a_tiff_is_applied_once() -> None:
    """Pillow rotates a TIFF while loading it."""
    image = accept(encoded(photo(), "TIFF", tiffinfo={274: 6}), RULES)
    assert (image.width, image.height, image.orientation) == (120, 160, 1)


@pytest.mark.parametrize("error", [ValueError("Insufficient memory (case 4)"), MemoryError()])
def test_lack_of_memory_does_not_reject_the_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    with pytest.raises(MemoryError):
        accept(JPEG, RULES)


def test_orientation_is_kept_by_reencoding_and_shrinking() -> None:
    for data in (encoded(photo("CMYK"), exif=oriented(8)), encoded(photo(), "PNG", exif=oriented(8))):
        image = accept(data, ImageRules(max_side=80))
        assert image.orientation == 8
        assert parse_header(image.data).orientation == 8
        assert (image.width, image.height) == (80, 60), "the orientation is recorded, not applied"


@pytest.mark.parametrize(
    ("rules", "source", "expected"),
    [
        ({"max_side": 80}, (160, 120), (80, 60)),
        ({"max_side": 80}, (120, 160), (60, 80)),
        ({"short_side": 60}, (160, 120), (80, 60)),
        ({"short_side": 60}, (120, 160), (60, 80)),
        ({"short_side": 60, "max_side": 70}, (160, 120), (70, 52)),
        ({"max_side": 80}, (1000, 2), (80, 1)),
    ],
)
def test_shrunk_images_have_the_requested_size(
    rules: dict[str, int], source: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = accept(encoded(photo(size=source), quality=95), ImageRules(**rules))
    with Image.open(io.BytesIO(image.data)) as result:
        assert result.size == expected == (image.width, image.height)
    assert image.repair is None, "shrinking is not a repair"


def test_images_are_never_enlarged() -> None:
    assert accept(JPEG, ImageRules(max_side=160)).data == JPEG
    assert accept(JPEG, ImageRules(short_side=500, max_side=400)).data == JPEG


def test_shrinking_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    with Image.open(io.BytesIO(accept(encoded(stripes, quality=100), ImageRules(max_side=64)).data)) as result:
        assert np.abs(np.int32(result)[:, 4:-4] - 128).max() < 24, "stripes of one pixel must become uniform gray"


def test_check_header_does_not_decode_the_pixels() -> None:
    assert accept(DAMAGED, ImageRules(check="header")).data == DAMAGED
    with pytest.raises(Rejected):
        accept(REJECTED["text.jpg"], ImageRules(check="header"))


def test_a_folder_with_every_kind_of_image_is_converted(tmp_path: Path) -> None:
    """Every file of the tables above is kept, re-encoded, rejected, or not used."""
    folder = tmp_path / "source" / "train" / "a class with spaces"
    folder.mkdir(parents=True)
    for name, data in (KEPT | REENCODED | REJECTED | IGNORED).items():
        (folder / name).write_bytes(data)
    os.symlink(folder / "baseline.JPEG", folder / "a_link.jpg")
    os.symlink("nowhere.jpg", folder / "broken_link.jpg")
    os.symlink("itself.jpg", folder / "itself.jpg")
    os.symlink(folder.parent, folder / "loop")
    os.mkfifo(folder / "pipe.jpg")
    for below in ("deeper", ".thumbnails"):
        (folder / below).mkdir()
        (folder / below / "baseline.JPEG").write_bytes(JPEG)

    convert(tmp_path / "source", tmp_path / "set", Options(max_rejects=1.0))

    kept = KEPT | {"a_link.jpg": JPEG, "deeper/baseline.JPEG": JPEG}
    shard_set = ShardSet(tmp_path / "set")
    index = shard_set.index("train")
    assert len(index) == len(kept) + len(REENCODED)
    assert sorted(index["hash"][index["repaired"] == 0]) == sorted(map(xxhash.xxh3_64_intdigest, kept.values()))
    assert int(index["repaired"].sum()) == len(REENCODED)
    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    reasons = {reject["image"].rpartition("/")[2]: reject["reason"] for reject in rejects}
    assert set(reasons) == {*REJECTED, "broken_link.jpg", "itself.jpg"}
    assert reasons["broken_link.jpg"] == "a dangling symbolic link"
    assert reasons["itself.jpg"] == "a symbolic link to itself"
    unused = sum(entry["count"] for entry in shard_set.manifest.made["unused"])
    assert unused == len(IGNORED) + 3, "plus the pipe, the hidden folder, and the link to a parent folder"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (b"n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        (b"a class/two.dots and (brackets).jpg", "a_class/two_dots_and__brackets_"),
        (b"c/.hidden.jpg", "c/_hidden"),
        (b"c/no_suffix", "c/no_suffix"),
        ("c/é.png".encode(), "c/__"),
    ],
)
def test_keys_have_only_allowed_characters(name: bytes, key: str) -> None:
    assert sample_key(name) == key


def test_long_keys_are_truncated_and_stay_unique() -> None:
    one, other = (sample_key(b"c/" + b"x" * 200 + end + b".jpg") for end in (b"1", b"2"))
    assert one != other
    assert max(len(one), len(other)) <= 95
