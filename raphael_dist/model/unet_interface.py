"""The inputs and outputs of the U-Net.

Shape legend: B samples, C latent channels, h and w latent height and width, Y text tokens, D text width, K experts,
L transformer blocks.
"""

from typing import NamedTuple

from torch import Tensor


class GateNoise(NamedTuple):
    """Noise for the logits of the gates, float32. It depends only on the seed and the sample's position in training.

    Attributes:
        time_BLK: for the time gates of L transformer blocks, which select one of K experts for each of B samples.
        space_BLYK: for the text gates of the blocks, which select one of K experts for each of a sample's Y text tokens.
    """

    time_BLK: Tensor
    space_BLYK: Tensor


class UNetInput(NamedTuple):
    """Inputs of the U-Net for B samples.

    Attributes:
        x_BCHW: noised latents. For super-resolution, the channels of the small images are appended.
        timestep_B: diffusion timestep of each sample, int64.
        text_BYD: Y text tokens of width D for each sample.
        text_mask_BY: bool, False at padding.
        end_B: index of the end-of-text token, int64.
        noise: noise on the logits of the gates, which select experts, in training; None: no noise.
    """

    x_BCHW: Tensor
    timestep_B: Tensor
    text_BYD: Tensor
    text_mask_BY: Tensor
    end_B: Tensor
    noise: GateNoise | None


class UNetOutput(NamedTuple):
    """Results of one forward pass of the U-Net.

    This is a tuple because DeepSpeed looks for tensors only in tuples, lists and dicts. If DeepSpeed finds no tensor, it
    does not prepare the backward pass, and gradients of earlier micro-steps are added twice.

    Attributes:
        prediction: predicted noise, velocity or flow [B, C, h, w].
        edge_logits: for each transformer block with an edge module, logits of the predicted edges, float32 [B, h, w].
        space_used: for each block, share of image tokens (0..1) that each of K space experts processes, [B, K].
        time_expert: for each block, the time expert of each sample, int64 [B].
        balance: for each block, load-balance loss of the gates, float32 [B]; empty if this loss is off or gradients are
            disabled.
    """

    prediction: Tensor
    edge_logits: tuple[Tensor, ...] = ()
    space_used: tuple[Tensor, ...] = ()
    time_expert: tuple[Tensor, ...] = ()
    balance: tuple[Tensor, ...] = ()


class ControlResiduals(NamedTuple):
    """Tensors that a ControlNet adds to the U-Net's skip connections (outermost first) and to its middle block's output."""

    skips: tuple[Tensor, ...]
    middle: Tensor
