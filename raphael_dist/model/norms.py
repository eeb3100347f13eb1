"""Normalisations of the U-Net, by torch's operations or by the Triton kernels of `train.kernels`.

Shape legend: B samples, C channels, H and W of the feature map, D width of a token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a feature map [B, C, H, W], followed by SiLU if `silu` is True.

    The output has the memory format of the input, except with `use_kernel` (the Triton kernel), which returns channels last.
    """

    def __init__(self, groups: int, channels: int, eps: float, silu: bool) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu, self.use_kernel = silu, False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised feature map [B, C, H, W], after SiLU if the module was built with `silu`."""
        if self.use_kernel:
            from raphael_dist.model.kernels.group_norm import group_norm

            return group_norm(x_BCHW, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        h_BCHW = super().forward(x_BCHW)
        return match_format(F.silu(h_BCHW), x_BCHW) if self.silu else h_BCHW


class LayerNorm(nn.LayerNorm):
    """LayerNorm of tokens. With `use_kernel` its backward pass is a Triton kernel."""

    use_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens x [..., D], each normalised over its D values."""
        if self.use_kernel:
            from raphael_dist.model.kernels.layer_norm import layer_norm

            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def match_format(h_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return the feature map h in the memory format (contiguous or channels last) of the feature map x.

    Needed because, up to torch 2.13, the output of GroupNorm on CUDA is always contiguous.
    """
    channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return h_BCHW.contiguous(memory_format=torch.channels_last) if channels_last else h_BCHW
