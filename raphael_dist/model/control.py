"""ControlNet (arXiv 2302.05543; RAPHAEL, Fig. 7): a frozen U-Net, and a trained copy of its way down that reads an edge map.

What the copy computes reaches the U-Net's skips and its middle through convolutions that begin at zero, so that nothing
changes at first. Names are those of diffusers' ControlNetModel; experts and gates are copied as well.

Shape legend: B samples, C channels, h and w latent height and width, Y text tokens, D text width.
"""

from typing import cast

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from raphael_dist.config import Config
from raphael_dist.model.unet import Added, GateNoise, RaphaelUNet, Stage

# The condition is a picture, as diffusers' is: a map has three equal channels. Width of what reads it, as there.
CONDITION, READER_WIDTH = 3, 16


class ControlNet(RaphaelUNet):
    """The way down and the middle of a U-Net: what they give is added to the skips and the middle of another."""

    def __init__(self, config: Config) -> None:
        """`config`: of the U-Net. It has no edge modules of its own."""
        super().__init__(config.model_copy(update={"edge": config.edge.model_copy(update={"weight": 0.0})}))
        del self.up_blocks, self.conv_norm_out, self.conv_out
        stages = cast(list[Stage], [*self.down_blocks, self.mid_block])
        self.block_levels = self.block_levels[: sum(len(stage.attentions or ()) for stage in stages)]
        for gates in ("time_gates", "text_gates"):
            if hasattr(self, gates):
                setattr(self, gates, getattr(self, gates)[: self.num_blocks])
        widths = [config.model.channels[0]]
        for stage in stages[:-1]:
            width = cast(nn.Conv2d, stage.resnets[0].get_submodule("conv2")).out_channels
            widths += [width] * (len(stage.resnets) + len(stage.downsamplers or ()))
        # At the latents' size, where the data have their edge maps: nothing is made smaller.
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(widths[0], CONDITION, (READER_WIDTH,))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)
        for block in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            for p in block.parameters():
                if not p.is_meta:
                    nn.init.zeros_(p)

    def forward(  # type: ignore[override]
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BYD: Tensor,
        text_mask_BY: Tensor,
        end_B: Tensor,
        noise: GateNoise | None,
        edge_Bhw: Tensor,
    ) -> Added:
        """Return what is added, for an edge map in 0..1 at the latents' size; all else as the U-Net has it."""
        through, _ = self.begin(x_BCHW, timestep_B, text_BYD, text_mask_BY, end_B, _first(noise, self.num_blocks))
        condition = edge_Bhw.to(x_BCHW.dtype).unsqueeze(1).expand(-1, CONDITION, -1, -1)
        middle, skips = self.way_down(through, self.enter(x_BCHW) + self.controlnet_cond_embedding(condition))
        added = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return Added(tuple(added), self.controlnet_mid_block(middle))


def add_control(model: RaphaelUNet, config: Config, seed: int) -> None:
    """Freeze the model and give it a control that begins as a copy of its way down. `seed` fixes what is new in it."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = ControlNet(config)
    copied = control.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in control.state_dict()}, strict=False
    )
    assert all(name.startswith("controlnet_") for name in copied.missing_keys), copied.missing_keys
    model.control = control


def _first(noise: GateNoise | None, blocks: int) -> GateNoise | None:
    # The U-Net's own noise: the copy's blocks begin as its first ones, and route as they do.
    return noise and GateNoise(noise.time_BLK[:, :blocks], noise.space_BLYK[:, :blocks])
