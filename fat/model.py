"""FAT, the Fully Adaptive Transformer (Fan, Huang, Zhou, He: "Lightweight Vision Transformer with Bidirectional
Interaction", NeurIPS 2023, arXiv 2306.00396)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fat.config import STAGES, FATConfig
from fat.features import FeatureInfo, default_cfg, stage_indices
from fat.fused_layers import convolve_relu
from fat.layers import ConvNorm, GroupNorm1, pointwise
from fat.stage import Stage

MIN_SIZE = 32  # minimum pixels per side, because the fourth stage has stride 32


class Trunk(nn.Module):
    """Stem and four stages, shared by the classifier `FAT` and the feature extractor `FATFeatures`."""

    def __init__(self, config: FATConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_info = FeatureInfo(config.widths)
        self.pretrained_cfg = self.default_cfg = default_cfg(config)
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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names, by which timm forms groups from the stem to the head (layer decay).

        coarse: one group per stage instead of one per block.
        """
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]  # 99999: part of the group before
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def _feature_maps(self, images: Tensor, taken: Sequence[int], last: int) -> tuple[Tensor, list[Tensor]]:
        """Return the feature map of stage `last`, and those of the stages in `taken`, finest first."""
        x = self.stem(images)
        taken_maps = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            x = stage.feature_map(x)
            if index in taken:
                taken_maps.append(x)
            if index == last:
                break
            x = stage.reduce(x)
        return x, taken_maps

    def _prune(self, last: int) -> None:
        """Remove the modules that the feature map of stage `last` does not need."""
        del self.stages[last + 1 :]
        stage = self.stages[last]
        assert isinstance(stage, Stage)
        stage.remove_reduction()


class FAT(Trunk):
    """FAT classifier: images [B, in_chans, H, W] -> logits [B, num_classes].

    images: float, in any memory format; H and W are at least 32.
    """

    def __init__(self, config: FATConfig) -> None:
        super().__init__(config)
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.global_pool = "avg"
        self.num_classes = config.num_classes
        self.norm: nn.Module = GroupNorm1(self.num_features)
        self.head: nn.Module = _classifier(self.num_features, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalized feature map of the last stage: [B, widths[3], ceil(H / 32), ceil(W / 32)]."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the result of `forward_features` and return logits [B, num_classes].

        pre_logits: return the pooled features [B, widths[3]] instead.
        """
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a linear layer, or the identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one; with num_classes=0 the model returns pooled features.

        global_pool: "avg"; "" to return the feature map [B, widths[3], H, W] without pooling, which requires
        num_classes=0; None to leave it unchanged.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool: expected 'avg' or '' (no pooling), got {global_pool!r}")
        if num_classes and not global_pool:
            raise ValueError("global_pool: '' (no pooling) requires num_classes=0, because the classifier is linear")
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = _classifier(self.num_features, num_classes).to(next(self.parameters())).train(self.training)

    def forward_intermediates(  # noqa: PLR0917  timm's signature
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the result of `forward_features`, and feature maps as `FATFeatures` returns them. timm's interface.

        Args:
            x: images.
            indices: stages whose feature maps are returned, finest first: numbers from 0 to 3, where negative ones
                count from the last; or n for the last n stages; None for all four.
            norm: normalize the last stage's feature map. The others have no norm.
            stop_early: compute no more stages than necessary. The first result is then the last one's feature map.
            output_fmt: layout of the feature maps; only "NCHW".
            intermediates_only: return only the list of feature maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken, end = stage_indices(indices, len(self.stages)), len(self.stages) - 1
        last = max(taken) if stop_early else end
        x, features = self._feature_maps(x, taken, last)
        norms_feature = norm and end in taken
        if last == end and (norms_feature or not intermediates_only):
            x = self.norm(x)
        if norms_feature:
            features[-1] = x
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that `forward_intermediates(indices=indices)` does not need. timm's interface.

        Args:
            indices: stages whose feature maps are needed.
            prune_norm: remove the norm too. It is removed in any case if the last stage is.
            prune_head: remove pooling and classifier too. They are removed in any case if the last stage is.

        Returns:
            The numbers of the needed stages, for later calls of `forward_intermediates`.
        """
        taken, end = stage_indices(indices, len(self.stages)), len(self.stages) - 1
        last = max(taken)
        if prune_norm or last < end:
            self.norm = nn.Identity()
        if last < end:
            self._prune(last)
            self.num_features = self.head_hidden_size = self.config.widths[last]
        if prune_head or last < end:
            self.reset_classifier(0, "")
        return taken


class FATFeatures(Trunk):
    """Feature extractor for detection and segmentation: images as for `FAT` -> a list of feature maps, finest first.

    Feature map i is float [B, channels[i], ceil(H / reduction[i]), ceil(W / reduction[i])], in channels-last memory,
    with channels and reduction from `feature_info`. It is taken after the stage's last attention, before the stage
    halves the resolution, and is not normalized. Stages after the last feature map are not part of the model.

    out_indices: stages whose feature maps are returned, as in `FAT.forward_intermediates`, in ascending order.
    """

    def __init__(self, config: FATConfig, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__(config)
        indices = stage_indices(out_indices, option="out_indices")
        if indices != sorted(set(indices)):
            raise ValueError(f"out_indices: expected each stage at most once, in ascending order, got {out_indices!r}")
        self.feature_info = FeatureInfo(config.widths, indices)
        self.pretrained_cfg = self.default_cfg = default_cfg(config, classifier=False)
        self._prune(indices[-1])

    @property
    def unused(self) -> tuple[str, ...]:
        """Prefixes of a classifier's parameter names that this model does not have."""
        last = self.feature_info.out_indices[-1]
        parts = () if last + 1 == STAGES else ("norm2", "ffn", "shortcut")
        block = f"stages.{last}.blocks.{self.config.depths[last] - 1}"
        return "head.", "norm.", *(f"stages.{i}." for i in range(last + 1, STAGES)), *(f"{block}.{p}." for p in parts)

    def forward(self, images: Tensor) -> list[Tensor]:
        indices = self.feature_info.out_indices
        return self._feature_maps(images, indices, indices[-1])[1]


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
