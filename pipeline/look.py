"""`pipeline look SET`: a contact sheet of the images that the model receives, next to their sources."""

from __future__ import annotations

import io
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from annotated_types import Interval
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pipeline.augment.recipe import CropArea
from pipeline.options import LoaderOptions
from shards.errors import UserError, first_line
from shards.files.output import MARK, check_output, write_output
from shards.memory import check_memory
from shards.option_help import default
from shards.progress import Phases
from shards.ranges import CropPct, Fraction, Seed, Side, check_ranges
from shards.redact import printable

if TYPE_CHECKING:
    from pipeline.augment.recipe import AugmentRecipe
    from pipeline.batch import Batch
    from pipeline.storage.reader import Encoded
    from shards.format.dataset import ShardSet

Pixels = NDArray[np.uint8]

MARGIN, FONT_SIZE = 6, 11
MIN_PANEL = 128
WINDOW_COLOR = (255, 40, 40)
CAPTION_LINES = 4
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}


@dataclass(frozen=True)
class Look:
    """Write a contact sheet of images as the model receives them: each source with its crop window, the cropped and
    augmented image, and the list of the operations that were applied."""

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    out: Path = Path("batch.png")
    """Image file to write: .png, .jpg, .webp, .bmp or .tif."""
    split: str = "train"
    """Split whose images are shown. Images of other splits than train are shown as in an evaluation: resized and
    cropped at the center, without augmentation."""
    augment: Literal["fat", "light", "none"] = "light"
    """Augmentation recipe. Mixup and CutMix are not applied, because a mixed image shows two classes."""
    size: Side = 224
    """Side of the images that the model receives, in pixels."""
    count: Annotated[int, Interval(ge=1, le=10_000)] = 24
    """Number of images."""
    flip: Annotated[Fraction | None, default("the recipe's")] = None
    """Probability of a horizontal flip."""
    crop_scale: Annotated[tuple[CropArea, CropArea] | None, default("the recipe's")] = None
    """Smallest and largest area of the random crop, as fractions of the image's area."""
    crop_pct: Annotated[CropPct | None, default("0.875")] = None
    """With --split other than train: fraction of the short side that the center crop keeps."""
    seed: Seed = 0
    """Seed of the run."""
    epoch: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """Epoch whose first images are shown, from 0."""
    diff: bool = False
    """Also show the same augmentation computed by PIL, the reference, and the difference in levels (0 to 255)."""
    loader: Literal["auto", "dali", "ffcv"] = "auto"
    """Decoder. auto: dali if the set has tar shards, ffcv if it has only a .beton file."""
    set_digest: Annotated[str | None, default("not checked")] = None
    """Expected digest of the set's dataset.json, xxh3=HEX or sha256=HEX as 'pipeline info' prints it."""
    cache: Annotated[Path | None, default("$FAT_CACHE, else the temporary folder")] = None
    """Cache folder for a remote set."""
    cache_shared: bool = False
    """Use one cache for all users in the group of the cache folder, instead of one cache per user."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self) -> int:
        from pipeline.augment.recipe import augment_recipe
        from pipeline.storage.remote.shard_set import open_set

        training = self.split == "train"
        if self.diff and not training:
            raise UserError(f"--diff with --split {self.split}: only training images are augmented; omit --diff")
        check_output(self.out, "--out", FORMATS, default=Look.out)
        side, panels = max(self.size, MIN_PANEL), 3 if self.diff else 2
        # Size in bytes of the contact sheet and the float32 batch.
        needed = self.count * (3 * panels * side**2 + 4 * 3 * self.size**2)
        check_memory(f"--count {self.count}, --size {self.size}", needed, "use a smaller --count or --size")
        from_environment = os.environ.get("FAT_CACHE")
        cache = self.cache or (Path(from_environment) if from_environment else None)
        dataset = open_set(self.dataset, cache=cache, cache_shared=self.cache_shared, digest=self.set_digest)
        overrides = {"flip": self.flip, "scale": self.crop_scale}
        recipe = augment_recipe(
            self.augment, size=self.size, mixup=0.0, cutmix=0.0, **{k: v for k, v in overrides.items() if v is not None}
        )
        count = min(self.count, dataset.split(self.split).samples)
        with Phases("look", 2) as progress:
            sheet = contact_sheet(self._cells(dataset, count, recipe, progress))
        image = io.BytesIO()
        kind = FORMATS[self.out.suffix.lower()]
        info = PngInfo()
        info.add_text("Software", MARK)
        try:
            sheet.save(image, kind, **{"pnginfo": info} if kind == "PNG" else {})
        except (OSError, ValueError) as error:  # the image is too large for the format, or Pillow has no encoder
            raise UserError(
                f"--out {self.out}: Pillow cannot write {sheet.width} x {sheet.height} pixels as {kind} ({error}); "
                "use a smaller --count, or a .png file"
            ) from error
        write_output(self.out, image.getvalue(), "--out")
        shown = f"epoch {self.epoch}, recipe {self.augment}" if training else f"split {self.split}"
        summary = f"{self.out}: {count} images of {self.dataset}, {shown}"
        print(printable(summary))
        return 0

    def _cells(self, dataset: ShardSet, count: int, recipe: AugmentRecipe, progress: Phases) -> list[Cell]:
        from pipeline.augment.describe import describe
        from pipeline.augment.params import draw
        from pipeline.augment.reference import reference_sample
        from pipeline.storage.placement import open_storage
        from pipeline.storage.reader import SampleReader

        progress.begin(f"loading {count} images")
        batch = self._batch(dataset, count, recipe)
        received = denormalized(batch.images.float().cpu().numpy(), recipe)
        progress.begin("reading and drawing their sources")
        beton = self.loader == "ffcv" or not dataset.split(self.split).tars
        with SampleReader(open_storage(dataset, self.split, beton=beton)) as reader:
            encoded = reader.read(batch.ids).checked()
        sizes = {"heights": encoded.rows["height"], "widths": encoded.rows["width"]}
        if self.split == "train":
            params = draw(recipe, seed=self.seed, epoch=self.epoch, ids=batch.ids, **sizes)
            windows: NDArray[Any] = params.windows
            operations = [describe(params, i) for i in range(count)]
        else:
            windows = center_crops(**sizes, size=self.size, crop_pct=self._crop_pct)
            operations = ["center crop"] * count
        cells = []
        for i, row in enumerate(encoded.rows):
            source = source_image(encoded, i)
            panels = [with_crop_window(source, windows[i], self.size), received[i]]
            title = f"{printable(dataset.manifest.classes[int(row['label'])].title)} #{batch.ids[i]}"
            if self.diff:
                (reference,) = denormalized(reference_sample(source, recipe, params, i)[None], recipe)
                error = np.abs(reference.astype(int) - received[i])
                title += f"; PIL (right) differs by {error.mean():.2f} levels on average, {error.max()} at most"
                panels.append(reference)
            cells.append(Cell(panels, title, operations[i]))
        return cells

    @property
    def _crop_pct(self) -> float:
        from pipeline.jobs import CROP_PCT

        return CROP_PCT if self.crop_pct is None else self.crop_pct

    def _batch(self, dataset: ShardSet, count: int, recipe: AugmentRecipe) -> Batch:
        """Return the first `count` images of the epoch, or of the evaluation, exactly as the model receives them."""
        import torch

        from pipeline.batch_shape import BatchShape
        from pipeline.loader import EvalLoader, TrainLoader
        from pipeline.plan import EvalPlan, Position, TrainPlan

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options = LoaderOptions(loader=self.loader)
        loader: TrainLoader | EvalLoader
        if self.split == "train":
            plan = TrainPlan(dataset.shard_samples("train"), global_batch=count, seed=self.seed)
            shape, start = BatchShape(global_batch=count), Position(self.epoch, 0)
            loader = TrainLoader(
                dataset, plan, shape, recipe, epochs=self.epoch + 1, start=start, device=device, options=options
            )
        else:
            loader = EvalLoader(
                dataset,
                EvalPlan(count, batch=count),
                size=self.size,
                mean=recipe.mean,
                std=recipe.std,
                device=device,
                split=self.split,
                crop_pct=self._crop_pct,
                options=options,
            )
        with loader:
            return next(iter(loader))


@dataclass(frozen=True)
class Cell:
    """One sample of the contact sheet."""

    panels: list[Pixels]
    """Images drawn side by side, uint8 [size, size, 3] each."""
    title: str
    """Class, sample id and, with --diff, the difference from the reference."""
    operations: str
    """Description of the augmentation."""


def source_image(encoded: Encoded, row: int) -> Image.Image:
    """Decode the image of one sample with Pillow.

    Raises:
        DecodeError: Pillow cannot decode it, although another decoder may.
    """
    from pipeline.decode.job import DecodeError

    data, stored = encoded.images[row], encoded.rows[row]
    try:
        if encoded.raw[row]:
            return Image.fromarray(data.reshape(int(stored["height"]), int(stored["width"]), 3))
        return Image.open(io.BytesIO(data.tobytes()), formats=("JPEG",)).convert("RGB")
    except Exception as error:  # Pillow raises exceptions of many types
        raise DecodeError.of([encoded.ids[row]], first_line(error) or type(error).__name__) from error


def denormalized(images: NDArray[np.float32], recipe: AugmentRecipe) -> list[Pixels]:
    """Convert normalized images, float32 [n, 3, H, W], to n images of uint8 [H, W, 3]."""
    mean, std = (np.asarray(values).reshape(3, 1, 1) for values in (recipe.mean, recipe.std))
    pixels = np.rint((images * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return list(pixels.transpose(0, 2, 3, 1))


def center_crops(
    heights: NDArray[np.int32], widths: NDArray[np.int32], *, size: int, crop_pct: float
) -> NDArray[np.float64]:
    """Return the crop windows of an evaluation in the source images: (y, x, height, width), float64 [n, 4]."""
    from pipeline.jobs import eval_windows

    windows, regions = eval_windows(heights, widths, size, crop_pct)
    return np.hstack([windows[:, :2] + regions[:, :2], regions[:, 2:]])


def with_crop_window(source: Image.Image, window: NDArray[Any], size: int) -> Pixels:
    """Fit the source into a square and draw the outline of a crop window: uint8 [size, size, 3].

    Args:
        window: y, x, height and width in pixels of the source.
    """
    scale = size / max(source.size)
    width, height = (max(1, round(side * scale)) for side in source.size)
    square = Image.new("RGB", (size, size), "white")
    corner = (size - width) // 2, (size - height) // 2
    square.paste(source.resize((width, height), Image.Resampling.BICUBIC), corner)
    y, x, high, wide = (window * scale).tolist()
    left, top = corner[0] + x, corner[1] + y
    ImageDraw.Draw(square).rectangle((left, top, left + wide - 1, top + high - 1), outline=WINDOW_COLOR)
    return np.asarray(square)


def contact_sheet(cells: list[Cell]) -> Image.Image:
    """Draw a roughly square grid of cells, each with its caption below."""
    font = ImageFont.load_default(FONT_SIZE)
    size, panels = len(cells[0].panels[0]), len(cells[0].panels)
    scale = max(1, math.ceil(MIN_PANEL / size))
    line, width = FONT_SIZE + 2, panels * size * scale
    letters = int(width / font.getlength("0"))
    captions = [
        (textwrap.wrap(cell.title, letters) + textwrap.wrap(cell.operations, letters))[:CAPTION_LINES] for cell in cells
    ]
    cell_w = width + MARGIN
    cell_h = size * scale + max(map(len, captions)) * line + 2 * MARGIN
    columns = max(1, min(len(cells), round(math.sqrt(len(cells) * cell_h / cell_w))))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        x, y = MARGIN + number % columns * cell_w, MARGIN + number // columns * cell_h
        strip = Image.fromarray(np.concatenate(cell.panels, axis=1))
        sheet.paste(strip.resize((width, size * scale), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + size * scale + 2), "\n".join(caption), "black", font, spacing=2)
    return sheet
