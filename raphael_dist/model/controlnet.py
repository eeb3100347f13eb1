"""ControlNet (arXiv 2302.05543; RAPHAEL, Fig. 7): a frozen U-Net, and a trained copy of its encoder that reads an edge map.

The outputs of the copy are added to the U-Net's skip connections and middle block through convolutions that start at zero,
so the model's output is unchanged at first. Parameter names are those of diffusers' ControlNetModel. Experts and gates are
copied as well.

Shape legend: B samples, C channels, h and w latent height and width, Y text tokens, D text width.
"""

from typing import TYPE_CHECKING, cast

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from raphael_dist.model.layers import UNetLevel
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import ControlResiduals, GateNoise, UNetInput

if TYPE_CHECKING:
    from raphael_dist.config.schema import Config

# The condition is an image, as in diffusers: an edge map is repeated in three channels. 16 is diffusers' first width.
CONDITION_CHANNELS, CONDITION_WIDTH = 3, 16


class ControlNet(RaphaelUNet):
    """A copy of a U-Net's encoder and middle block that also reads an edge map.

    Its outputs (residuals) are added to the skip connections and the middle of that U-Net.
    """

    def __init__(self, config: "Config") -> None:
        """Build the ControlNet of a U-Net with the configuration `config`.

        It lacks the modules with which a U-Net predicts edge maps as an auxiliary task.
        """
        super().__init__(config, with_edges=False)
        del self.up_blocks, self.conv_norm_out, self.conv_out
        levels = cast(list[UNetLevel], [*self.down_blocks, self.mid_block])
        self.block_levels = self.block_levels[: sum(len(level.attentions or ()) for level in levels)]
        if config.model.time_experts and config.model.time_routing == "learned":
            self.time_gates = self.time_gates[: self.num_blocks]
        if config.model.space_experts:
            self.text_gates = self.text_gates[: self.num_blocks]
        widths = [config.model.channels[0]]
        for level in levels[:-1]:
            width = cast(nn.Conv2d, level.resnets[0].get_submodule("conv2")).out_channels
            widths += [width] * (len(level.resnets) + len(level.downsamplers or ()))
        # The data have edge maps at the size of the latents, so nothing is downsampled.
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(widths[0], CONDITION_CHANNELS, (CONDITION_WIDTH,))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)
        for block in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            for p in block.parameters():
                if not p.is_meta:
                    nn.init.zeros_(p)

    def forward(self, inputs: UNetInput, edge_Bhw: Tensor) -> ControlResiduals:  # type: ignore[override]
        """Return the tensors (residuals) to add to the U-Net's skip connections and to the output of its middle block.

        Args:
            inputs: the inputs of the U-Net: noised latents, timesteps, text tokens.
            edge_Bhw: edge maps in 0..1 at the size of the latents, [B, h, w].
        """
        x_BCHW = inputs.x_BCHW
        # The copy's blocks select experts as the first blocks of the U-Net do, with the same noise.
        state, _ = self.begin(inputs._replace(noise=_first_blocks(inputs.noise, self.num_blocks)))
        condition = edge_Bhw.to(x_BCHW.dtype).unsqueeze(1).expand(-1, CONDITION_CHANNELS, -1, -1)
        middle, skips = self.encode(state, self.stem(x_BCHW) + self.controlnet_cond_embedding(condition))
        residuals = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return ControlResiduals(tuple(residuals), self.controlnet_mid_block(middle))


def add_control(model: RaphaelUNet, config: "Config", seed: int) -> None:
    """Freeze a U-Net and set its attribute `control` to a ControlNet that starts as a copy of its encoder.

    Args:
        model: the U-Net, changed in place.
        config: configuration of the U-Net.
        seed: fixes the initial values of the ControlNet's new weights.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = ControlNet(config)
    names = control.state_dict().keys()
    shared = {name: value for name, value in model.state_dict().items() if name in names}
    missing = control.load_state_dict(shared, strict=False).missing_keys
    assert all(name.startswith("controlnet_") for name in missing), missing
    model.control = control


def _first_blocks(noise: GateNoise | None, blocks: int) -> GateNoise | None:
    return noise and GateNoise(noise.time_BLK[:, :blocks], noise.space_BLYK[:, :blocks])
