"""One of the four stages of the network: the blocks of one resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fat.activation_checkpointing import checkpoint_block
from fat.blocks import Block
from fat.config import STAGES, FATConfig


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

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the last feature map at this stage's resolution."""
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(block, x)
        assert isinstance(last, Block)
        return self._run(last, x, part=last.apply_attention if self.reduces else None)

    def reduce(self, x: Tensor) -> Tensor:
        """Compute the stage's output from its last feature map: the second half of the last block."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return self._run(last, x, part=last.apply_ffn)

    def remove_reduction(self) -> None:
        """Remove the second half of the last block, if it reduces: the output is then the last feature map."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        if self.reduces:
            last.remove_ffn()
        self.reduces = False

    def _run(self, block: nn.Module, x: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        function = part or block
        checkpointing = self.checkpointing and self.training and torch.is_grad_enabled()
        return checkpoint_block(function, x, block) if checkpointing else function(x)
