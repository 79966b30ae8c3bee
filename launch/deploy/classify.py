"""Classify images in batches, which are decoded on CPU threads while the model computes."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor, nn

import fat
from launch.deploy.images import ImageSource
from shards.errors import UserError
from shards.images.accept import accept
from shards.images.rules import ImageRules, Rejected

BATCHES_AHEAD = 2  # batches that are decoded ahead of the model
# EXIF orientation (TIFF 6.0, tag 274) -> how to rotate the stored pixels upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Result:
    """Result of one image."""

    name: str
    """See `ImageSource.name`."""
    outputs: tuple[int, ...] = ()
    """Outputs of the model with the highest probabilities, highest first; empty if the image cannot be used."""
    probabilities: tuple[float, ...] = ()
    """Softmax of these outputs, over all outputs of the model."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    fault: str | None = None
    """Why the image cannot be used; None if it was classified."""


@dataclass(frozen=True)
class Classifier:
    """Classifies images as evaluation does: with the same pixels, in fp32."""

    model: nn.Module
    """Model in eval mode on `device`: normalized images [B, 3, H, W] -> logits."""
    transform: fat.ImageTransform
    device: torch.device
    top: int
    """Number of classes per result; all, if the model has fewer."""
    batch: int
    """Images per forward pass."""
    threads: int
    """Threads that decode."""
    apply_orientation: bool = False
    """Whether to rotate images as their EXIF orientation states; training and evaluation do not."""

    def __call__(self, images: Iterable[ImageSource]) -> Iterator[Result]:
        """Yield the result of each image, in order."""
        remaining, pending = iter(images), deque[Future[_Decoded]]()
        # `accept` changes the filters of warnings, which are not separate for threads.
        with warnings.catch_warnings(), ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    ahead = BATCHES_AHEAD * self.batch - len(pending)
                    pending.extend(pool.submit(self._decode, source) for source in islice(remaining, ahead))
                    if not pending:
                        return
                    decoded = [pending.popleft().result() for _ in range(min(self.batch, len(pending)))]
                    yield from self._classify(decoded)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, source: ImageSource) -> _Decoded:
        """Decode, resize and crop an image.

        Images that `pipeline shard` would re-encode as JPEGs are re-encoded here, too, so that the pixels are those of
        a shard set.
        """
        try:
            accepted = accept(source.read(), ImageRules())
            pixels = simplejpeg.decode_jpeg(accepted.data, "RGB")
            if self.apply_orientation and accepted.orientation in UPRIGHT:
                pixels = np.array(Image.fromarray(pixels).transpose(UPRIGHT[accepted.orientation]))
            cropped = self.transform.crop(torch.from_numpy(pixels).permute(2, 0, 1))
            return _Decoded(source.name, cropped, accepted.orientation)
        except (Rejected, UserError, ValueError) as error:
            fault = str(error)
        except OSError as error:
            fault = error.strerror or str(error)
        except MemoryError:
            fault = "not enough memory to decode it"
        return _Decoded(source.name, fault=fault)

    @torch.inference_mode()
    def _classify(self, decoded: list[_Decoded]) -> Iterator[Result]:
        pixels = [image.pixels for image in decoded if image.pixels is not None]
        rows: Iterator[tuple[list[int], list[float]]] = iter(())
        if pixels:
            images = self.transform.normalize(torch.stack(pixels).to(self.device))
            logits = self.model(images).float()
            # Of the logits, as in evaluation: different logits may have equal probabilities.
            outputs = logits.topk(min(self.top, logits.shape[1]), dim=1).indices
            probabilities = logits.softmax(dim=1).gather(1, outputs)
            rows = zip(outputs.tolist(), probabilities.tolist(), strict=True)
        results = []
        for image in decoded:
            if image.pixels is None:
                results.append(Result(image.name, fault=image.fault))
                continue
            best, scores = next(rows)
            results.append(Result(image.name, tuple(best), tuple(scores), image.orientation))
        return iter(results)


@dataclass(frozen=True)
class _Decoded:
    """A decoded image, or why there is none."""

    name: str
    pixels: Tensor | None = None
    """uint8 [3, size, size]."""
    orientation: int = 1
    fault: str | None = None
