"""The public import path of this project's pipelines and models with the interfaces of diffusers."""

from raphael_dist.model.diffusers_model import RaphaelControlNet, RaphaelUNet2D
from raphael_dist.sampling.pipeline import RaphaelPipeline
from raphael_dist.sampling.pipeline_variants import (
    RaphaelControlNetPipeline,
    RaphaelImg2ImgPipeline,
    RaphaelInpaintPipeline,
    RaphaelUpscalePipeline,
)

__all__ = [
    "RaphaelControlNet",
    "RaphaelControlNetPipeline",
    "RaphaelImg2ImgPipeline",
    "RaphaelInpaintPipeline",
    "RaphaelPipeline",
    "RaphaelUNet2D",
    "RaphaelUpscalePipeline",
]
