"""Image formats are recognized by name and by content; a missing decoder is named in the reject reason."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401
import pytest
from PIL import Image

from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import ConversionFailed
from shards.images.accept import accept
from shards.images.formats import MAGIC_BYTES, looks_like_image, named_as_image
from shards.images.header_size import jxl_size
from shards.images.jpeg import parse_header
from shards.images.rules import ImageRules, Rejected
from shards.sources.scan import ScanOptions
from tests.support.decompression_bombs import jxl

pillow_heif.register_heif_opener()
RULES = ImageRules()
WIDTH, HEIGHT = 64, 48


def example_image() -> Image.Image:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([x * 3, y * 4, 255 - x * 2], axis=-1).astype(np.uint8))


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or example_image()).save(out, kind, **options)
    return out.getvalue()


def text_pnm() -> bytes:
    return b"P3\n# a comment\n64 48\n255\n" + b" ".join(b"%d" % value for value in np.asarray(example_image()).ravel())


FORMATS: dict[str, Callable[[], bytes]] = {
    ".ppm": lambda: saved("PPM"),
    ".pnm": text_pnm,
    ".tga": lambda: saved("TGA"),
    ".TGA": lambda: saved("TGA", compression="tga_rle"),
    ".pcx": lambda: saved("PCX"),
    ".sgi": lambda: saved("SGI"),
    ".qoi": lambda: saved("QOI"),
    ".jp2": lambda: saved("JPEG2000"),
    ".j2k": lambda: saved("JPEG2000", no_jp2=True),
    ".avif": lambda: saved("AVIF", quality=95),
    ".heic": lambda: saved("HEIF", quality=95),
    ".jxl": lambda: saved("JXL"),
    ".jxlc": lambda: saved("JXL", use_container=True),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_converted_to_a_jpeg_of_the_same_image(suffix: str) -> None:
    data = FORMATS[suffix]()
    image = accept(data, RULES)
    assert parse_header(image.data).is_standard
    assert (image.width, image.height, image.orientation) == (WIDTH, HEIGHT, 1)
    with Image.open(io.BytesIO(image.data)) as shown:
        assert np.abs(np.int32(shown.convert("RGB")) - np.int32(example_image())).mean() < 3
    assert named_as_image(b"photo" + suffix.replace("jxlc", "jxl").encode())
    assert accept(data, ImageRules(max_side=32)).width == 32


@pytest.mark.parametrize("suffix", [".ppm", ".qoi", ".jp2", ".j2k", ".avif", ".heic", ".jxl", ".jxlc"])
def test_formats_with_a_signature_are_recognized_by_content(suffix: str) -> None:
    assert looks_like_image(FORMATS[suffix]()[:MAGIC_BYTES])


@pytest.mark.parametrize("text", [b"P1 is the first part", b"P6 and P5 are others", b"Phone: 12 34 56", b"\0" * 16])
def test_other_files_are_not_recognized_as_images(text: bytes) -> None:
    assert not looks_like_image(text[:MAGIC_BYTES])


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" * 9, b"GRIB" + bytes(99)])
def test_formats_that_run_external_programs_are_rejected(data: bytes) -> None:
    with pytest.raises(Rejected, match="not an image"):
        accept(data, RULES)


@pytest.mark.parametrize(
    ("module", "suffix", "package"),
    [("pillow_heif", ".heic", "pillow-heif"), ("pillow_jxl", ".jxl", "pillow-jxl-plugin")],
)
def test_the_reject_reason_names_the_missing_package(
    module: str, suffix: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Rejected, match=rf"needs {package}: pip install 'fat-pipeline\[formats\]'"):
        accept(FORMATS[suffix](), RULES)


def test_the_error_for_too_many_rejects_names_the_reason_and_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class consists of HEIC photos, and the HEIF decoder is not installed: the error names the remedy."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name, data in {
        "a/1.jpg": saved("JPEG"),
        "b/1.heic": FORMATS[".heic"](),
        "b/2.heic": FORMATS[".heic"](),
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    reason = r"2 of 3 .*\(2: decoding HEIC images needs.*'fat-pipeline\[formats\]'.*b/1\.heic\)"
    with pytest.raises(ConversionFailed, match=reason):
        convert(tmp_path / "in", tmp_path / "out", Options(scan=ScanOptions(workers=1)))


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JXL", "JPEG"])
def test_the_orientation_is_applied_exactly_once(kind: str) -> None:
    """If the decoder rotates the image, the recorded orientation must not rotate it again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = accept(saved(kind, exif=exif.tobytes(), quality=95), RULES)
    stored = Image.open(io.BytesIO(image.data)).convert("RGB")
    upright = stored.transpose(Image.Transpose.ROTATE_270) if image.orientation == 6 else stored
    assert image.orientation in (1, 6)
    expected = np.int32(example_image().transpose(Image.Transpose.ROTATE_270))
    assert np.abs(np.int32(upright) - expected).mean() < 4


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (8, 8), (300, 200), (256, 144), (12345, 6789)])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size: tuple[int, int]) -> None:
    assert jxl_size(jxl(*size)) == jxl_size(jxl(*size, container=True)) == size
    if max(size) < 400:
        assert jxl_size(saved("JXL", Image.new("RGB", size))) == size


def test_a_source_with_many_formats_is_converted(tmp_path: Path) -> None:
    """The source has files with suffixes, files without suffixes, and an EPS file, which is not used."""
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for suffix, make in FORMATS.items():
        (folder / f"{suffix[1:]}{suffix.replace('jxlc', 'jxl')}").write_bytes(make())
    for suffix in (".avif", ".jp2", ".heic"):
        (folder / f"no_suffix_{suffix[1:]}").write_bytes(FORMATS[suffix]())
    (folder / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    convert(tmp_path / "in", tmp_path / "out", Options())
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["splits"]["train"]["samples"] == len(FORMATS) + 3
    assert not (tmp_path / "out" / "rejects.jsonl").exists()
