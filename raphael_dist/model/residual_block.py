"""The residual block of the U-Net: diffusers' block and parameter names, with a forward pass of its own.

Shape legend: B samples, C channels, H and W of the feature map, E width of the timestep embedding.
"""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.model.norms import GroupNorm


class ResidualBlock(ResnetBlock2D):
    """diffusers' residual block: `x + conv(silu(norm(conv(silu(norm(x))) + time)))`.

    diffusers' forward pass makes the input of the shortcut contiguous in training. The forward pass of this class
    keeps the memory format of the feature map (see `feature_map_format`).

    Args:
        inner: channels of the input.
        outer: channels of the output.
        embed: width of the timestep embedding.
        groups: groups of each GroupNorm.
    """

    def __init__(self, inner: int, outer: int, embed: int, groups: int) -> None:
        super().__init__(in_channels=inner, out_channels=outer, temb_channels=embed, groups=groups, eps=1e-5)
        self.norm1 = GroupNorm(groups, inner, eps=1e-5, silu=True)
        self.norm2 = GroupNorm(groups, outer, eps=1e-5, silu=True)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """Return the block's output [B, C', H, W] for a feature map [B, C, H, W] and the timestep embeddings [B, E]."""
        time_BC11 = self.time_emb_proj(F.silu(embedding_BE))[:, :, None, None]
        h_BCHW = self.conv1(self.norm1(x_BCHW)) + time_BC11
        h_BCHW = self.conv2(self.norm2(h_BCHW))
        out_BCHW: Tensor = h_BCHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))
        return out_BCHW


def feature_map_format(device: torch.device) -> torch.memory_format:
    """Return the memory format for the U-Net's feature maps on `device`: channels last on GPUs, contiguous on CPUs.

    Convolutions are faster on GPUs in channels last. Weights are contiguous on every device, because ZeRO flattens them and
    checkpoints store them in that order.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last
