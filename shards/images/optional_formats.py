"""Load the optional decoders of HEIF and JPEG XL when the first such image is read."""

from __future__ import annotations

from shards.images.formats import EXTRA, is_heif, is_jxl
from shards.images.rules import Rejected


def load_optional_decoder(data: bytes) -> str | None:
    """Register the decoder of an image's format with Pillow, if Pillow does not include one.

    Returns:
        Pillow's name of the format; None if no optional decoder is needed.

    Raises:
        Rejected: the decoder's package is not installed.
    """
    if is_heif(data):
        try:
            import pillow_heif
        except ImportError as error:
            raise _missing("HEIC", "pillow-heif") from error
        # One thread, because there is one worker per core; thumbnails and other auxiliary images are not used.
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
        f"decoding {kind} images needs {package}: pip install 'fat-pipeline[{EXTRA}]', then repeat the conversion"
    )
