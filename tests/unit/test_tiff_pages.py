"""Only the first page of a TIFF with several pages is used, and the repair reason says so."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from shards.images.accept import accept
from shards.images.rules import ImageRules
from shards.images.tiff import has_second_page

FIRST, SECOND = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))


def tiff(*more: Image.Image, big: bool = False) -> bytes:
    file = io.BytesIO()
    FIRST.save(file, "TIFF", save_all=True, append_images=more, big_tiff=big)
    return file.getvalue()


@pytest.mark.parametrize("big", [False, True])
def test_only_the_first_page_is_used_and_the_reason_says_so(big: bool) -> None:
    accepted = accept(tiff(SECOND, big=big), ImageRules())
    assert accepted.repair == "TIFF with several pages, only the first page used"
    red, _, blue = Image.open(io.BytesIO(accepted.data)).convert("RGB").getpixel((20, 15))
    assert red > 200
    assert blue < 50
    assert accept(tiff(big=big), ImageRules()).repair == "TIFF"


def test_a_damaged_second_page_is_ignored() -> None:
    data = tiff(SECOND)
    assert has_second_page(data)
    assert accept(data[:-40], ImageRules()).repair == "TIFF with several pages, only the first page used"


@pytest.mark.parametrize(
    "data", [b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0+" + bytes(4) + b"\xff" * 8, b"\xff\xd8\xff"]
)
def test_truncated_data_has_no_second_page(data: bytes) -> None:
    assert not has_second_page(data)
