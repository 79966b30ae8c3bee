"""Images above the size limits are shrunk if bounded memory allows it; otherwise they are rejected with a remedy."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from shards.images import limits
from shards.images.accept import accept
from shards.images.rules import ImageRules, Rejected
from tests.support.decompression_bombs import png, progressive_jpeg
from tests.support.measured import run_measured

SMALL = 100_000  # MAX_PIXELS in these tests


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accept", "header_checks"):
        monkeypatch.setattr(f"shards.images.{module}.MAX_PIXELS", SMALL)
    monkeypatch.setattr("shards.images.header_checks.MAX_SHRUNK_PIXELS", 10 * SMALL)


def waves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([128 + 90 * np.sin(x / 90), 128 + 90 * np.cos(y / 70), x * 255 / width], -1).astype(np.uint8)
    ).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("rules", [{"max_side": 100}, {"max_side": 150}, {"short_side": 64}, {"max_side": 390}])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_above_max_pixels_are_shrunk_during_decoding(rules: dict[str, int], mode: str, progressive: bool) -> None:
    source = waves(797, 501, mode)
    image = accept(jpeg(source, progressive=progressive), ImageRules(**rules))
    expected = source.resize((image.width, image.height), Image.Resampling.HAMMING)
    assert abs(image.width / image.height - 797 / 501) < 0.02
    with Image.open(io.BytesIO(image.data)) as shown:
        assert shown.mode == mode
        assert np.abs(np.int32(shown) - np.int32(expected)).mean() < 4
    assert image.repair is None


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    ("data", "rules", "reason"),
    [
        (jpeg(waves(797, 501)), {}, "797x501 pixels.*--max-side"),
        (jpeg(waves(1400, 900)), {"max_side": 100}, "1400x900 pixels; JPEGs of at most 1 million"),
        (jpeg(waves(797, 501, "CMYK")), {"max_side": 100}, "797x501 pixels.*JPEGs"),
        (png(797, 501), {"max_side": 100}, "797x501 pixels.*JPEGs"),
        (jpeg(waves(797, 501))[:9000], {"max_side": 100}, "damaged JPEG of 797x501 pixels"),
    ],
)
def test_images_too_large_to_shrink_are_rejected_with_a_remedy(data: bytes, rules: dict[str, int], reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        accept(data, ImageRules(**rules))


def test_large_jpegs_with_too_many_scans_are_rejected() -> None:
    with pytest.raises(Rejected, match="scans"):
        accept(progressive_jpeg(20_000, 20_000, 9), ImageRules(max_side=100))


def test_memory_of_progressive_coefficients_is_included_in_the_estimate() -> None:
    with pytest.raises(Rejected, match="shrinking a progressive JPEG of 30000x30000 pixels needs about"):
        accept(progressive_jpeg(30_000, 30_000, 1), ImageRules(max_side=100))


def test_images_longer_than_a_jpeg_allows_are_shrunk() -> None:
    image = accept(png(70_000, 20), ImageRules(max_side=700))
    assert (image.width, image.height) == (700, 1)
    with pytest.raises(Rejected, match="at most 65,500 per side are allowed; --max-side"):
        accept(png(70_000, 20), ImageRules())


def test_shrinking_allocates_memory_only_for_the_smaller_image() -> None:
    code = """
        import io, json
        from PIL import Image
        from shards.images.accept import ImageRules, accept
        from tests.support.decompression_bombs import comment
        sink = io.BytesIO()
        Image.new("L", (12_000, 10_000), 200).save(sink, "JPEG")
        data = sink.getvalue()
        del sink
        measure()
        image = accept(data, ImageRules(max_side=512))
        print(json.dumps([grown(), image.width, image.height]))
    """
    grown, *size = json.loads(run_measured(code))
    assert size == [512, 427]
    assert grown < 32 * 2**20
    assert limits.MAX_PIXELS < 12_000 * 10_000
