"""The FAT block and its parts: FASA (fully adaptive self-attention) and the convolutional feed-forward network.

Every feature map is a float tensor [B, C, H, W] in channels-last memory. The weights may have either memory format.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fat import kernels
from fat.fused_layers import add_norm, can_take_norm, convolve_fold, convolve_gate, convolve_norm, has_foldable_norm
from fat.layers import (
    ConvNorm,
    Depthwise,
    DropPath,
    FusingModule,
    GroupNorm1,
    Pointwise,
    ResidualDepthwise,
    depthwise,
    has_hooks,
    is_unmodified,
    pointwise,
)

SHORTCUT_KERNEL = 5  # kernel size of the depthwise stride-2 convolution in `Shortcut`
POOL_KERNEL = 5  # kernel size of every depthwise stride-2 convolution in `Pool`


class Block(FusingModule):
    """FAT block: `x + cpe(x)`, then `x + FASA(norm(x))`, then `shortcut(x) + ConvFFN(norm(x))` (paper, section 3.1).

    [B, dim, H, W] -> [B, out_dim, ceil(H / stride), ceil(W / stride)]. `cpe` is the convolutional positional encoding.
    The shortcut is the identity unless the stride is 2 or `out_dim` differs from `dim`.
    """

    has_ffn = True
    """Whether the block has its second half; see `remove_ffn`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel: int,
        window: int,
        *,
        out_dim: int | None = None,
        stride: int = 1,
        ffn_ratio: int = 4,
        ffn_kernel: int = 5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.cpe = ResidualDepthwise(dim, kernel)
        self.norm1 = GroupNorm1(dim)
        self.attn = FASA(dim, heads, kernel, window)
        self.norm2 = GroupNorm1(dim)
        self.ffn = ConvFFN(dim, dim * ffn_ratio, out_dim, ffn_kernel, stride)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or out_dim != dim:
            self.shortcut = Shortcut(dim, out_dim, stride)
        self.finish_init()

    def decide_fusion(self) -> None:
        self._fuses_cpe = is_unmodified(self.cpe, ResidualDepthwise) and is_unmodified(self.norm1, GroupNorm1)
        self._fuses_sum = (
            self.has_ffn and is_unmodified(self.drop_path, DropPath) and is_unmodified(self.norm2, GroupNorm1)
        )

    def remove_ffn(self) -> None:
        """Remove the feed-forward network, so that the block's output is that of `apply_attention`."""
        self.has_ffn = False
        del self.norm2, self.ffn, self.shortcut

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_ffn:
            return self.apply_attention(x)
        return self._ffn_residual(*add_norm(self.drop_path, self.norm2, *self._attend(x), fuses=self._fuses_sum))

    def apply_attention(self, x: Tensor) -> Tensor:
        """Apply positional encoding and attention: the first half of the block, which keeps the resolution."""
        return self.drop_path(*self._attend(x))

    def apply_ffn(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network: the second half of the block, which has the stride."""
        return self._ffn_residual(x, self.norm2(x))

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with its positional encoding, and the attention branch that is added to it."""
        x, normalized = convolve_norm(self.cpe, self.norm1, x, fuses=self._fuses_cpe)
        return x, self.attn(normalized)

    def _ffn_residual(self, x: Tensor, normalized: Tensor) -> Tensor:
        return self.drop_path(self.shortcut(x), self.ffn(normalized))


class Shortcut(FusingModule, nn.Sequential):
    """Shortcut of a block that changes resolution or width: depthwise convolution, BatchNorm, 1x1 convolution."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__(ConvNorm(depthwise(dim, SHORTCUT_KERNEL, stride)), pointwise(dim, out_dim))
        self.finish_init()

    def decide_fusion(self) -> None:
        unit, after = self
        self._fuses = has_foldable_norm(unit) and can_take_norm(after)

    def forward(self, x: Tensor) -> Tensor:
        unit, after = self
        return convolve_fold(unit, after, x, fuses=self._fuses)  # type: ignore[arg-type]


class FASA(FusingModule):
    """Fully adaptive self-attention: a local and a global branch that modulate each other (paper, section 3.2).

    The local branch is a depthwise convolution of the queries. The global branch attends from every position to the
    (H / window) x (W / window) keys of a feature map that convolutions have pooled. The gate of the released code,
    `S * sigmoid(G) * G` with `S = L * sigmoid(L)`, is computed as the product of two SiLUs.
    """

    def __init__(self, dim: int, heads: int, kernel: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = (dim // heads) ** -0.5
        self.q = pointwise(dim, dim)
        self.kv = pointwise(dim, 2 * dim)
        self.pool = Pool(dim, window)
        self.local = depthwise(dim, kernel)
        self.proj = pointwise(dim, dim)
        self.finish_init()

    def decide_fusion(self) -> None:
        self._fuses_gate = is_unmodified(self.local, Depthwise)
        self._fuses_kv = can_take_norm(self.kv)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        attended = self.attend(q, self.pool.project(x, self.kv, fuses=self._fuses_kv))
        return self.proj(convolve_gate(self.local, q, attended, fuses=self._fuses_gate))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v of each head: [B, C, H, W].

        q: [B, C, H, W]. kv: [B, 2 C, h, w]; keys are the first C channels, values the others.
        """
        if kernels.can_attend(q, kv, self.heads):
            return kernels.attend(q, kv, self.heads, self.scale)
        k, v = kv.chunk(2, dim=1)
        out = self.attention(*(self._split(x) for x in (q, k, v)))
        return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, q.shape[-2:])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention in PyTorch: q [B, heads, H W, d]; k, v [B, heads, h w, d]; returns q's shape."""
        if q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        # On a CPU both variants are equally fast in fp32, but in bf16 with 49 keys the backward pass of
        # scaled_dot_product_attention is many times slower. Scaling the keys is cheapest, since there are few of them.
        return ((q @ (k * self.scale).transpose(-2, -1)).softmax(dim=-1)) @ v

    def _split(self, x: Tensor) -> Tensor:
        """Reshape [B, C, H, W] to [B, heads, H W, C / heads]; a view if x is channels-last."""
        return x.flatten(2).transpose(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class Pool(FusingModule, nn.Sequential):
    """Downsample the input of keys and values by `window` per side (the paper's fine-grained downsampling).

    Each step halves the resolution by a depthwise convolution and BatchNorm; a 1x1 convolution follows every step but
    the last. There is no activation. With window 1 it is the identity.
    """

    def __init__(self, dim: int, window: int) -> None:
        steps: list[nn.Module] = []
        for _ in range(window.bit_length() - 1):
            steps += [ConvNorm(depthwise(dim, POOL_KERNEL, stride=2)), pointwise(dim, dim)]
        super().__init__(*steps[:-1])
        self.finish_init()

    def decide_fusion(self) -> None:
        self._fuses = all(map(has_foldable_norm, [*self][::2])) and all(map(can_take_norm, [*self][1::2]))

    def project(self, x: Tensor, after: Pointwise, *, fuses: bool) -> Tensor:
        """Return after(self(x)), with each BatchNorm folded into the 1x1 convolution that follows it.

        fuses: whether the last BatchNorm can be folded into `after`.
        """
        if not (fuses and self._fuses and len(self)) or has_hooks(self):
            return after(self(x))
        steps = [*self, after]
        for unit, conv in zip(steps[::2], steps[1::2], strict=True):
            x = convolve_fold(unit, conv, x, fuses=True)
        return x


class ConvFFN(FusingModule):
    """Feed-forward network: 1x1 to the hidden width, GELU, depthwise convolution, BatchNorm, 1x1 to the output width.

    With stride 1 the depthwise convolution has a residual connection.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.fc1 = pointwise(dim, hidden)
        self.dw = ConvNorm(ResidualDepthwise(hidden, kernel) if stride == 1 else depthwise(hidden, kernel, stride))
        self.fc2 = pointwise(hidden, out_dim)
        self.finish_init()

    def decide_fusion(self) -> None:
        self._fuses = has_foldable_norm(self.dw) and can_take_norm(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_fold(self.dw, self.fc2, self.fc1(x), fuses=self._fuses, gelu=True)
