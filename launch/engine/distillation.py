"""Knowledge distillation: the training loss with the outputs of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fat.kernels
from launch.config.distillation import DistillationConfig
from launch.engine.loss import autocast

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Teacher:
    """A trained model, and what is needed to use its outputs for the student's classes and images."""

    model: nn.Module
    """In eval mode, on the CPU."""
    outputs: tuple[int, ...] | None
    """The model's output of each class; None: output i is class i."""
    scale: Channels
    """Factor of each channel of the student's normalized images, to get the teacher's."""
    shift: Channels
    """Summand of each channel, after the factor."""
    digest: str
    """Hash of the weights, 16 hex digits."""
    description: str
    """Model and source, for messages."""

    @property
    def converts(self) -> bool:
        """Whether the teacher was trained with another normalization than the student."""
        return (self.scale, self.shift) != ((1.0,) * 3, (0.0,) * 3)


class Distiller:
    """Computes the training loss with a teacher, without gradients for it. All ranks have a complete copy of it.

    The teacher sees the same augmented and mixed images as the student (consistent teaching, arXiv 2106.05237). It is
    in eval mode, under the student's autocast, and runs in PyTorch, because its kernels have not been checked.

    Args:
        teacher: its model is moved to the device.
        precision: bf16 or fp32.
    """

    def __init__(self, teacher: Teacher, config: DistillationConfig, device: torch.device, precision: str) -> None:
        self._config, self._device, self._precision = config, device, precision
        model = teacher.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model: nn.Module = model.eval().requires_grad_(False)
        self._outputs = None if teacher.outputs is None else torch.tensor(teacher.outputs, device=device)
        self._scale, self._shift = (
            torch.tensor(values, device=device).view(3, 1, 1) if teacher.converts else None
            for values in (teacher.scale, teacher.shift)
        )

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Return the weighted sum of the loss with the labels and the distillation loss, as a float32 scalar.

        Args:
            loss: loss with the labels, float32 scalar.
            logits: [B, outputs] of the student, any float dtype.
            images: [B, 3, H, W], normalized for the student.
        """
        alpha = self._config.distillation_alpha
        found = distillation_loss(logits, self.logits(images), self._config)
        return (1 - alpha) * loss + alpha * found

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits of the student's classes, [B, classes]."""
        if self._scale is not None and self._shift is not None:
            images = torch.addcmul(self._shift, images.float(), self._scale).to(images.dtype)
        with fat.kernels.use("off"), autocast(self._device, self._precision):
            logits: Tensor = self._model(images)
        return logits if self._outputs is None else logits.index_select(1, self._outputs)


def distillation_loss(logits: Tensor, teacher: Tensor, config: DistillationConfig) -> Tensor:
    """Return the mean distillation loss of a batch, a float32 scalar.

    Hard: the cross-entropy with the teacher's most probable class, without label smoothing (DeiT, section 3.2). Soft:
    T^2 KL(softmax(teacher / T) || softmax(logits / T)), whose gradients do not shrink with the temperature T (Hinton et
    al., section 2).

    Args:
        logits: [B, N] of the student. If N is larger than the number of classes, the other outputs have no target.
        teacher: [B, classes].
    """
    logits, teacher = logits.float(), teacher.float()
    if config.distillation == "hard":
        return F.cross_entropy(logits, teacher.argmax(dim=1))
    temperature, classes = config.distillation_temperature, teacher.shape[1]
    student = F.log_softmax(logits / temperature, dim=1)[:, :classes]
    target = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
