"""Convert PIL images of any mode to RGB, as `pipeline shard` does (`shards.images.pixels`)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageCms import ImageCmsTransform

_TRANSPARENT = ("LA", "PA", "La", "RGBA", "RGBa")
_MAX_16 = 65_535


def rgb_pixels(image: Image) -> Tensor:
    """Return the pixels of a PIL image: uint8 [3, H, W], in channels-last memory.

    Transparent pixels are composited onto white. CMYK, and RGB of formats other than JPEG, are converted from their ICC
    profile to sRGB; a JPEG's profile is ignored, as training ignores it. Of 16-bit gray, the upper 8 bits are kept;
    floating-point gray must be in 0 to 1. `pipeline shard` also reads from PNG and TIFF headers how many bits are
    significant, which Pillow does not tell.

    Raises:
        ValueError: gray values are outside the range of their type.
    """
    if image.mode[0] in "IF":
        return _gray_8bit(image).expand(3, -1, -1)
    profile = _to_srgb(image)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        from PIL import Image as images

        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if profile is not None:
        from PIL import ImageCms

        image = image if image.mode == profile.input_mode else image.convert(profile.input_mode)
        converted = ImageCms.applyTransform(image, profile)
        assert converted is not None  # it is, because the transform is not in place
        image = converted
    return _tensor(image.convert("RGB"), 3)


def _tensor(image: Image, channels: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1)


def _gray_8bit(image: Image) -> Tensor:
    """Convert 16-bit, 32-bit and floating-point gray to uint8 [1, H, W]."""
    if image.mode == "F":
        values = _tensor(image, 1, torch.float32).double()
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("the image has floating-point values outside 0 to 1; scale them to 8 bits first")
        return (values * 255).round().to(torch.uint8)
    samples = _tensor(image.convert("I"), 1, torch.int32)
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > _MAX_16:
        raise ValueError(f"the image has values from {low:,} to {high:,}; convert it to 8 bits first")
    # TIFFs of 32 bits often hold 8-bit values; other files of this mode have 16 bits.
    is_8bit = image.format == "TIFF" and image.mode == "I" and high < 256
    return (samples if is_8bit else samples >> 8).to(torch.uint8)


def _to_srgb(image: Image) -> ImageCmsTransform | None:
    """Return the transform of the image's colors to sRGB; None if none is needed or its profile is invalid."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        mode, space = "LAB", ""
    elif image.mode == "CMYK":
        mode, space = "CMYK", "CMYK"
    elif image.mode in ("RGB", "RGBA", "RGBX", "P", "PA") and image.format not in (None, "JPEG", "MPO"):
        mode, space = "RGB", "RGB "
    else:
        return None
    if not profile and mode != "LAB":
        return None
    from PIL import ImageCms

    try:
        srgb = ImageCms.createProfile("sRGB")
        if mode == "LAB":
            return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        if opened.profile.xcolor_space != space or "sRGB" in (opened.profile.profile_description or ""):
            return None
        return ImageCms.buildTransform(opened, srgb, mode, "RGB")
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return None
