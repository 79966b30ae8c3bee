"""Decoders of HEIF and JPEG XL, which an extra installs and which are imported when the first such image comes."""

from __future__ import annotations

from shards.images.formats import EXTRA, is_heif, is_jxl
from shards.images.rules import Rejected


def load_optional_decoder(data: bytes) -> str | None:
    """Register the decoder that an image needs beside Pillow's own.

    Returns:
        Pillow's name of the format; None where Pillow's own decoders are to try.

    Raises:
        Rejected: the extra is not installed.
    """
    if is_heif(data):
        try:
            import pillow_heif
        except ImportError as error:
            raise _missing("HEIC", "pillow-heif") from error
        # One thread, because there is a worker per core; nothing but the image is used.
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
        return "HEIF"
    if is_jxl(data):
        try:
            from pillow_jxl import JpegXLImagePlugin
        except ImportError as error:
            raise _missing("JPEG XL", "pillow-jxl-plugin") from error
        JpegXLImagePlugin.DECODE_THREADS = 0
        return "JXL"
    return None


def _missing(kind: str, package: str) -> Rejected:
    return Rejected(
        f"{kind} image, which needs {package}: pip install 'fat-pipeline[{EXTRA}]', then start the conversion anew"
    )
