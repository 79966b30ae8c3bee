"""`pipeline sample`: write small sample sources from images that installed libraries contain, without a download."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray
from PIL import Image

from shards.cores import cores
from shards.errors import UserError, explain_os_errors, reading
from shards.files.output import check_output_folder

DIGIT_SIDE = 64
DIGIT_QUALITY = 95
DIGITS_IN_VAL = 360  # validation images: a fifth of the 1797 digits
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# (width, height) and fraction of images, like ImageNet's training images: most are 500 pixels wide or high.
PHOTO_SIZES = (
    ((500, 375), 0.50),
    ((375, 500), 0.16),
    ((500, 333), 0.12),
    ((333, 500), 0.05),
    ((500, 500), 0.04),
    ((400, 300), 0.04),
    ((640, 480), 0.03),
    ((250, 188), 0.03),
    ((1024, 768), 0.02),
    ((120, 90), 0.01),
)
# Target of encoded bytes per pixel: ImageNet's images have on average 110 kB and about 180,000 pixels.
BYTES_PER_PIXEL = 0.95
BYTES_SPREAD = 0.5  # standard deviation of the logarithm of the size
PHOTO_QUALITIES = (80, 88, 93, 96, 98)
PHOTO_ZOOM = (0.75, 1.25)  # source pixels per output pixel, if the photo is large enough
PHOTO_VAL_FRACTION = 0.1
_AT_ONCE = 10_000  # images submitted to the thread pool at a time
_REMEDY = "remove the folder, then run the same command"

# library -> file (relative to the library's folder) -> class
PHOTOS = {
    "skimage": {
        "data/astronaut.png": "astronaut",
        "data/camera.png": "camera",
        "data/chelsea.png": "cat",
        "data/coffee.png": "coffee",
        "data/gravel.png": "gravel",
        "data/hubble_deep_field.jpg": "galaxy",
        "data/ihc.png": "tissue",
        "data/motorcycle_left.png": "motorcycle",
        "data/motorcycle_right.png": "motorcycle",
        "data/retina.jpg": "retina",
        "data/rocket.jpg": "rocket",
    },
    "sklearn": {"datasets/images/china.jpg": "temple", "datasets/images/flower.jpg": "flower"},
    "matplotlib": {"mpl-data/sample_data/grace_hopper.jpg": "officer"},
}


def write_digits(out: Path) -> Counter[str]:
    """Write scikit-learn's 1,797 handwritten digits, 64x64 pixels and gray, as OUT/{train,val}/CLASS/*.JPEG.

    Returns:
        Number of images per split: always 1437 and 360.

    Raises:
        UserError: scikit-learn is not installed, or `out` is not empty.
    """
    _library_folder("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    _check_out(out)
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scale levels 0 to 16 to 0 to 255
    in_val = _stratified(digits.target, DIGITS_IN_VAL)
    written: Counter[str] = Counter()
    with explain_os_errors(out, _REMEDY):
        for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
            split = "val" if in_val[number] else "train"
            folder = out / split / f"{label}_{DIGIT_NAMES[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            large = Image.fromarray(image).resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC)
            large.save(folder / f"digit_{number:04d}.JPEG", quality=DIGIT_QUALITY)
            written[split] += 1
    return written


def write_photos(out: Path, count: int, seed: int = 0) -> Counter[str]:
    """Write `count` random crops of photos as OUT/{train,val}/CLASS/*.JPEG, with ImageNet's distribution of sizes.

    The photos are part of scikit-image, scikit-learn and matplotlib; each subject is a class. The same count and seed
    give the same files.

    Returns:
        Number of images per split; one tenth is for validation.

    Raises:
        UserError: a library is not installed, or `out` is not empty.
    """
    _check_out(out)
    photos = _load_photos()
    if count < 2 * len(photos):
        raise UserError(f"--count {count}: at least {2 * len(photos)} images are required, one per class and split")
    in_val = max(len(photos), round(count * PHOTO_VAL_FRACTION))

    def write(number: int) -> str:
        split = "val" if number < in_val else "train"
        name, sources = photos[number % len(photos)]
        folder = out / split / name
        folder.mkdir(parents=True, exist_ok=True)
        encoded = _random_crop(sources, random.Random(f"{seed}/{number}"))
        (folder / f"{name}_{number:07d}.JPEG").write_bytes(encoded)
        return split

    written: Counter[str] = Counter()
    with explain_os_errors(out, _REMEDY), ThreadPoolExecutor(cores()) as pool:
        for start in range(0, count, _AT_ONCE):
            written.update(pool.map(write, range(start, min(start + _AT_ONCE, count))))
    return written


def _stratified(labels: NDArray[np.integer], wanted: int) -> NDArray[np.bool_]:
    """Choose `wanted` samples in proportion to the class sizes; a hash makes the choice deterministic."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * wanted / len(labels)
    quota = np.floor(exact).astype(int)
    largest_remainders = np.argsort(quota - exact, kind="stable")
    quota[largest_remainders[: wanted - quota.sum()]] += 1
    draw = np.array([xxhash.xxh3_64_intdigest(b"digit %d" % i) for i in range(len(labels))], dtype=np.uint64)
    chosen = np.zeros(len(labels), dtype=bool)
    for label, n in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(draw[members], kind="stable")[:n]]] = True
    return chosen


@dataclass(frozen=True)
class _Crop:
    """A crop window of a photo (left, top, width, height), and the size (width, height) to resize it to."""

    window: tuple[int, int, int, int]
    size: tuple[int, int]


def _random_crop(sources: list[Image.Image], draw: random.Random) -> bytes:
    photo = draw.choice(sources)
    crop = _draw_crop(photo.size, draw)
    left, top, width, height = crop.window
    image = photo.resize(crop.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    goal = crop.size[0] * crop.size[1] * BYTES_PER_PIXEL * draw.lognormvariate(0, BYTES_SPREAD)
    return min(_encodings(image), key=lambda encoded: abs(len(encoded) - goal))


def _draw_crop(available: tuple[int, int], draw: random.Random) -> _Crop:
    sizes, weights = zip(*PHOTO_SIZES, strict=True)
    (size,) = draw.choices(sizes, weights)
    zoom, limit = draw.uniform(*PHOTO_ZOOM), min(available[0] / size[0], available[1] / size[1])
    if zoom > limit:
        zoom = limit * draw.uniform(0.8, 1.0)  # at the limit, all crops of this size would be the same window
    width, height = int(size[0] * zoom), int(size[1] * zoom)
    left, top = draw.randint(0, available[0] - width), draw.randint(0, available[1] - height)
    return _Crop((left, top, width, height), size)


def _encodings(image: Image.Image) -> Iterator[bytes]:
    pixels = np.asarray(image)
    for quality in PHOTO_QUALITIES:
        if image.mode == "L":
            yield simplejpeg.encode_jpeg(pixels[:, :, None], quality, colorspace="GRAY", colorsubsampling="Gray")
        else:
            yield simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="420")


def _load_photos() -> list[tuple[str, list[Image.Image]]]:
    """Return (class, photos) pairs, sorted by class."""
    by_class: dict[str, list[Image.Image]] = {}
    for library, package in (("skimage", "scikit-image"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        root = _library_folder(library, package)
        for file, name in PHOTOS[library].items():
            with Image.open(root / file) as image:
                by_class.setdefault(name, []).append(image.convert("L" if image.mode == "L" else "RGB"))
    return sorted(by_class.items())


def _library_folder(library: str, package: str) -> Path:
    """Return the folder of an installed library."""
    from importlib.util import find_spec

    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise UserError(f"sample data needs {package}; install it with: pip install 'fat-pipeline[demo]'")
    return Path(spec.origin).parent


def _check_out(out: Path) -> None:
    """Check that the folder is empty or does not exist, and can be written."""
    with reading(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: already exists and is not empty; specify another folder, or remove it")
    check_output_folder(out, "the folder", "specify another")
