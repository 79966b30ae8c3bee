"""`pipeline look SET`: a picture of what the model will see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from shards.dataset import ShardSet
from shards.errors import UserError

MARGIN, CAPTION, FONT_SIZE = 6, 30, 11
MIN_CELL = 96


@dataclass(frozen=True)
class Look:
    """Draw one augmented training batch with class names and sample ids."""

    dataset: tyro.conf.Positional[Path]
    """Shard set."""
    out: Path = Path("batch.png")
    """Picture to write."""
    augment: Literal["fat", "light", "none"] = "light"
    """Augmentation recipe."""
    size: int = 224
    """Side of the images in pixels."""
    count: int = 32
    """Images to draw."""
    flip: float | None = None
    """Probability of a horizontal flip; None = the recipe's."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop, as shares of the image; None = the recipe's."""
    seed: int = 0
    """Seed of the run to look at."""
    epoch: int = 0
    """Epoch to look at."""

    def run(self) -> int:
        import torch

        from pipeline.augment.recipe import augment_recipe
        from pipeline.loader import TrainLoader
        from pipeline.plan import BatchShape, Position, TrainPlan

        dataset = ShardSet(self.dataset)
        overrides = {"flip": self.flip, "scale": self.crop_scale}
        # Mixed images would show two classes each; everything else is drawn as the model gets it.
        recipe = augment_recipe(
            self.augment, size=self.size, mixup=0.0, cutmix=0.0, **{k: v for k, v in overrides.items() if v is not None}
        )
        count = min(self.count, dataset.split("train").samples)
        plan = TrainPlan(dataset.shard_samples("train"), global_batch=count, seed=self.seed)
        loader = TrainLoader(
            dataset,
            plan,
            BatchShape(global_batch=count),
            recipe,
            epochs=self.epoch + 1,
            start=Position(self.epoch, 0),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        with loader:
            batch = next(loader)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.mean, recipe.std))
        pixels = (batch.images.float().cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        classes = dataset.manifest.classes
        captions = [
            f"{classes[label].title}\n#{sample}"
            for label, sample in zip(batch.labels.tolist(), batch.ids.tolist(), strict=True)
        ]
        sheet = contact_sheet(list(pixels.permute(0, 2, 3, 1).numpy()), captions)
        try:
            sheet.save(self.out)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.out}: cannot be written ({error}); give another --out FILE.png") from error
        print(f"{self.out}: {count} images of {self.dataset}, epoch {self.epoch}, recipe {self.augment}")
        return 0


def contact_sheet(images: list[np.ndarray], captions: list[str]) -> Image.Image:
    """A grid, about as wide as high, of images (uint8 [H, W, 3]) with two lines of caption below each."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    scale = max(1, math.ceil(MIN_CELL / max(height, width)))
    cell_w, cell_h = width * scale + MARGIN, height * scale + MARGIN + CAPTION
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + number % columns * cell_w
        y = MARGIN + number // columns * cell_h
        image = Image.fromarray(pixels)
        if scale > 1:
            image = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y))
        for line, text in enumerate(caption.split("\n")):
            pen.text((x, y + height * scale + 2 + line * (FONT_SIZE + 2)), _fit(text, pen, font, cell_w), "black", font)
    return sheet


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut so that it does not run into its neighbour."""
    while text and pen.textlength(text, font) > width - MARGIN:
        text = text[:-1]
    return text
