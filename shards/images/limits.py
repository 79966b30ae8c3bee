"""Limits on the memory and time spent on one image, each with its reason. docs/converting.md lists them.

They are checked against headers, before decoding. An image that exceeds a limit is rejected, with one exception: a JPEG
with more than `MAX_SCANS` scans is re-encoded if `MAX_SCAN_PIXELS` allows decoding it.
"""

from __future__ import annotations

MAX_ENCODED = 512 * 2**20
"""Bytes of an image file, which is held in memory: more than 100 megapixels of uncompressed 8-bit RGBA."""

MAX_PIXELS = 100_000_000
"""Width times height: the resolution of the largest digital cameras. Decoding time and memory grow with it."""

MAX_SHRUNK_PIXELS = 1_000_000_000
"""Width times height of a JPEG that is shrunk while it is decoded (aerial and microscope photos). Only the smaller
image is held in memory; decoding takes 3 to 10 seconds at this size."""

MAX_SIDE = 65_500
"""Pixels of the longer side: the limit of libjpeg (JPEG_MAX_DIMENSION), as all images are stored as JPEGs."""

MAX_DECODE_MEMORY = 2**30
"""Bytes of memory for decoding one image in a worker, estimated from the header. This suffices for 100 megapixels in
most formats (except progressive CMYK, WebP, AVIF, HEIF, JPEG XL, and JPEG 2000), and allows one worker per core on
machines with 2 GB per core."""

MAX_SCANS = 64
"""Scans of a JPEG that is kept byte for byte. libjpeg writes 10 (18 for CMYK), mozjpeg and jpegrescan up to about 15.
Each scan costs the decoder a pass over all pixels, in every epoch."""

MAX_SCAN_PIXELS = 2_000_000_000
"""Pixels times scans of a JPEG that is decoded: 20 scans of 100 megapixels take a few seconds."""

MAX_METADATA = 16 * 2**20
"""Bytes before the first scan of a JPEG (EXIF, ICC profiles, thumbnails), which Pillow parses in Python."""

MAX_SEGMENTS = 10_000
"""Segments before the first scan of a JPEG, or between its scans. A segment holds 64 kB; real files have hundreds."""

MAX_CHUNKS = 500_000
"""Chunks of a PNG. Encoders write at least 8 kB per chunk, so the largest allowed file has 65,000 chunks."""

MAX_STRIPS = 1_000_000
"""Strips or tiles of a TIFF. 100 megapixels have 390,000 tiles of 16x16 pixels."""

MAX_RUN_LENGTH_BMP = 16 * 2**20
"""Bytes of a run-length encoded BMP, which Pillow decodes in Python at about 2 MB/s."""

MAX_PYTHON_SAMPLES = 24_000_000
"""Pixels times channels of an image that Pillow decodes in Python, at about a million per second: QOI, text PNM (P1 to
P3), and PNM whose maximum value is neither 255 nor 65,535."""

MAX_PNM_HEADER = 2**16
"""Bytes of a PNM header including comments, which Pillow reads one by one."""

MAX_BOXES = 10_000
"""Boxes of an AVIF, HEIF, or JPEG 2000 file, and marker segments before the first tile of a JPEG 2000. Real files have
dozens."""

MAX_IMAGE_SECONDS = 60
"""CPU seconds that a worker may spend on one image before it is terminated: ten times what images within the other
limits need. CPU time, not wall time, because a stopped process or a slow disk is not a fault of the image."""
