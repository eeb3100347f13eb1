"""Makes a batch without data, with which a model can be traced on torch's `meta` device."""

import torch

from raphael_dist.config.schema import Config
from raphael_dist.config.upscale import COLOURS
from raphael_dist.model.batch import Batch
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.unet_interface import GateNoise

META = torch.device("meta")


def meta_batch(config: Config, samples: int, num_blocks: int) -> Batch:
    """Return a micro-batch of `samples` images of the largest configured size, on the `meta` device (shapes without data).

    `num_blocks`: number of transformer blocks of the model; each has its own gate noise.
    """
    m, text = config.model, config.text.max_tokens
    height, width = max(config.image.buckets, key=lambda size: size[0] * size[1])
    factor = latent_factor(config.image.vae)
    patch = config.upscale.patch
    with META:
        latents = torch.empty(samples, m.latent_channels, height // factor, width // factor)
        time_BLK = torch.empty(samples, num_blocks, m.time_experts)
        space_BLYK = torch.empty(samples, num_blocks, text, m.space_experts)
        small = torch.empty(samples, COLOURS, latents.shape[2] * patch, latents.shape[3] * patch)
        return Batch(
            position=torch.empty(samples, dtype=torch.long),
            weight=torch.empty(samples),
            x0=latents,
            noise=torch.empty_like(latents),
            timestep=torch.empty(samples, dtype=torch.long),
            text=torch.empty(samples, text, m.text_width),
            text_mask=torch.empty(samples, text, dtype=torch.bool),
            end=torch.empty(samples, dtype=torch.long),
            edge=torch.empty(samples, height, width) if config.edge.weight > 0 else None,
            gate_noise=GateNoise(time_BLK, space_BLYK) if m.gate_noise > 0 else None,
            small=small if config.upscale.factor else None,
        )
