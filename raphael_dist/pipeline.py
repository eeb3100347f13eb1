"""Pipelines and models in the form of diffusers, for users to import."""

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
