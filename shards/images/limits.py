"""Limits on the memory and time of one image, each with its reason. docs/sharding.md lists them.

They are checked in headers, before memory or time is spent. An image that exceeds a limit is rejected, except that a
JPEG of more than `MAX_SCANS` scans is re-encoded if `MAX_SCAN_PIXELS` allows decoding it.
"""

from __future__ import annotations

MAX_ENCODED = 512 * 2**20
"""Bytes of an image file: more than 100 megapixels take uncompressed in 8-bit RGBA. The file is held in memory."""

MAX_PIXELS = 100_000_000
"""Width times height: as much as the largest digital cameras make. Every decoder's work grows with it."""

MAX_SHRUNK_PIXELS = 1_000_000_000
"""Width times height of a JPEG that is shrunk while it is decoded, which takes memory for the smaller image alone, and
3 to 10 seconds at this size: aerial and microscope photos."""

MAX_SIDE = 65_500
"""Pixels of the longer side: the limit of libjpeg (JPEG_MAX_DIMENSION), in which every kept image is stored."""

MAX_DECODE_MEMORY = 2**30
"""Bytes that decoding one image may take in a worker, estimated from its header: enough for 100 megapixels of most
formats (not of progressive CMYK, WebP, AVIF, HEIF, JPEG XL and JPEG 2000), and little enough for a worker per core on
machines with 2 GB per core."""

MAX_SCANS = 64
"""Scans of a JPEG that is kept byte for byte. libjpeg writes 10 (18 for CMYK), mozjpeg and jpegrescan up to about 15;
each scan is a pass over all pixels, and the file may be decoded in every epoch."""

MAX_SCAN_PIXELS = 2_000_000_000
"""Pixels times scans of any JPEG: 20 scans of 100 megapixels, a few seconds of decoding."""

MAX_METADATA = 16 * 2**20
"""Bytes before the first scan of a JPEG (EXIF, ICC profiles, thumbnails): Pillow joins and parses them in Python."""

MAX_SEGMENTS = 10_000
"""Segments before the first scan of a JPEG, or between its scans; 64 kB each, so real files have a few hundred."""

MAX_CHUNKS = 500_000
"""Chunks of a PNG. Encoders write 8 kB or more per chunk, which comes to 65,000 in the largest file."""

MAX_STRIPS = 1_000_000
"""Strips or tiles of a TIFF: 100 megapixels in tiles of 16x16 are 390,000."""

MAX_RUN_LENGTH_BMP = 16 * 2**20
"""Bytes of a run-length encoded BMP, which Pillow decodes in Python, about 2 MB a second."""

MAX_PYTHON_SAMPLES = 24_000_000
"""Pixels times channels of an image that Pillow decodes in Python, about a million a second: QOI, plain PNM (P1 to P3),
and PNM whose largest value is neither 255 nor 65,535."""

MAX_PNM_HEADER = 2**16
"""Bytes of a PNM's header, comments included, which Pillow reads one by one."""

MAX_BOXES = 10_000
"""Boxes of a file, and marker segments before the first tile of a JPEG 2000; real files have dozens."""

MAX_IMAGE_SECONDS = 60
"""Seconds of CPU time that a worker may take for one image before it is ended: ten times what images within the other
limits take. CPU time, because a stopped process or a slow disk is no fault of the image."""
