"""FAT, the Fully Adaptive Transformer (Fan, Huang, Zhou, He: "Lightweight Vision Transformer with Bidirectional
Interaction", NeurIPS 2023, arXiv 2306.00396)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fat.activation_checkpointing import checkpoint_block
from fat.blocks import Block
from fat.config import STAGES, FATConfig
from fat.fused_layers import convolve_relu
from fat.layers import ConvNorm, GroupNorm1, pointwise

MIN_SIZE = 32  # minimum pixels per side, because the fourth stage has stride 32


class Trunk(nn.Module):
    """Stem and four stages, shared by the classifier `FAT` and the feature extractor `FATFeatures`."""

    def __init__(self, config: FATConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.in_chans, config.widths[0])
        self.stages = nn.ModuleList(Stage(config, index) for index in range(STAGES))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing: only each block's input is stored for the backward pass."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: biases and norm weights, which are the 1-D ones."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}


class FAT(Trunk):
    """FAT classifier: images [B, in_chans, H, W] -> logits [B, num_classes].

    images: float, in any memory format; H and W are at least 32.
    """

    def __init__(self, config: FATConfig) -> None:
        super().__init__(config)
        self.num_features = config.widths[-1]
        self.num_classes = config.num_classes
        self.norm = GroupNorm1(self.num_features)
        self.head: nn.Module = _classifier(self.num_features, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised feature map of the last stage: [B, widths[3], ceil(H / 32), ceil(W / 32)]."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the result of `forward_features` and return logits [B, num_classes].

        pre_logits: return the pooled features [B, widths[3]] instead.
        """
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialised one; with num_classes=0 the model returns pooled features."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes).to(self.norm.weight)


class FATFeatures(Trunk):
    """Feature extractor for detection and segmentation: images as for `FAT` -> one feature map per stage, finest first.

    Feature map i is float [B, channels[i], ceil(H / reduction[i]), ceil(W / reduction[i])], in channels-last memory,
    with channels and reduction from `feature_info`. It is taken after the stage's last attention, before the stage
    halves the resolution, and is not normalised.
    """

    def __init__(self, config: FATConfig) -> None:
        super().__init__(config)
        self.feature_info = FeatureInfo(config.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        features = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            fine, x = stage.forward_features(x)
            features.append(fine)
        return features


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """Channels and stride of each feature map, under timm's names."""

    widths: tuple[int, ...]

    def channels(self) -> list[int]:
        return list(self.widths)

    def reduction(self) -> list[int]:
        return [4, 8, 16, 32]


class Stage(nn.Module):
    """The blocks of one resolution. The last block halves the resolution, except in the last stage."""

    def __init__(self, config: FATConfig, index: int) -> None:
        super().__init__()
        width, depth, before = config.widths[index], config.depths[index], sum(config.depths[:index])
        self.checkpointing = False
        self.reduces = index + 1 < STAGES
        self.blocks = nn.ModuleList()
        for number in range(depth):
            last = self.reduces and number + 1 == depth
            self.blocks.append(
                Block(
                    width,
                    config.heads[index],
                    config.kernels[index],
                    config.windows[index],
                    out_dim=config.widths[index + 1] if last else width,
                    stride=2 if last else 1,
                    ffn_ratio=config.ffn_ratio,
                    ffn_kernel=config.ffn_kernel,
                    drop_path=config.drop_path * (before + number) / max(sum(config.depths) - 1, 1),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last feature map at this stage's resolution, and the stage's output."""
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(block, x)
        if not self.reduces:
            x = self._run(last, x)
            return x, x
        assert isinstance(last, Block)
        fine = self._run(last, x, part=last.apply_attention)
        return fine, self._run(last, fine, part=last.apply_ffn)

    def _run(self, block: nn.Module, x: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        function = part or block
        checkpointing = self.checkpointing and self.training and torch.is_grad_enabled()
        return checkpoint_block(function, x, block) if checkpointing else function(x)


class Stem(nn.Module):
    """Four 3x3 convolutions (strides 2, 2, 1, 1), a 1x1 convolution and a norm, with a total stride of 4."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        channels = (in_chans, width // 2, width, width, width)
        strides = (2, 2, 1, 1)
        self.convs = nn.ModuleList(
            ConvNorm(nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1)) for i, stride in enumerate(strides)
        )
        self.proj = pointwise(width, width)
        self.norm = GroupNorm1(width)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < MIN_SIZE:
            height, width = images.shape[-2:]
            raise ValueError(f"images of {height}x{width} pixels; FAT expects at least {MIN_SIZE} pixels per side")
        x = images.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = convolve_relu(conv, x)
        return self.norm(self.proj(x))


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes else nn.Identity()
