"""A RAPHAEL checkpoint in diffusers' terms: the U-Net as a diffusers model, and the sampler as a pipeline.

from raphael_dist.pipeline import RaphaelPipeline
pipeline = RaphaelPipeline.from_pretrained("exported")
pipeline(["a red heart, noto style"], seed=0).images[0].save("heart.png")
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from raphael_dist.config import config_from_tree
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.model.unet import RaphaelUNet, UNetOutput
from raphael_dist.sampling.sampling import generate

_Pipeline: Any = DiffusionPipeline  # type checkers do not see what its mixins add


class RaphaelUNet2D(ModelMixin, ConfigMixin):
    """`RaphaelUNet` as a model of diffusers, under the same parameter names."""

    @register_to_config
    def __init__(self, tree: dict[str, Any]) -> None:
        """`tree`: the sections `model`, `edge` and `run` of a configuration."""
        super().__init__()
        self._core = [RaphaelUNet(config_from_tree(tree))]  # in a list: not a child, whose name would prefix the parameters
        for name, child in self._core[0].named_children():
            self.add_module(name, child)

    def forward(self, *args: Any) -> UNetOutput:
        """As `RaphaelUNet.forward`."""
        return self._core[0](*args)


class _Dense(nn.Module):
    """diffusers' own U-Net with the signature of ours."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, end: Tensor) -> UNetOutput:
        return UNetOutput(self.unet(x, timestep, text).sample)


class RaphaelPipeline(_Pipeline):
    """Samples exactly as `raphael_dist.sample` does: the same seed gives the same image."""

    _optional_components = ["vae"]  # noqa: RUF012 (the name and type that diffusers looks for)

    def __init__(
        self,
        unet: RaphaelUNet2D | UNet2DConditionModel,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        max_tokens: int = 77,
        steps: int = 25,
        guidance: float = 4.5,
        size: Sequence[int] = (512, 512),
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(max_tokens=max_tokens, steps=steps, guidance=guidance, size=list(size))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: Sequence[int] | None = None,
    ) -> ImagePipelineOutput:
        """Return one PIL image per prompt in `.images`; defaults are those of the run that was exported."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        model = _Dense(cast(Any, self.unet)) if isinstance(self.unet, UNet2DConditionModel) else self.unet
        wanted = self.config.size if size is None else size
        images = generate(
            model.eval(),
            TextEncoder.of(self.text_encoder.eval(), self.tokenizer, self.config.max_tokens, "pipeline"),
            ImageEncoder.of(None if self.vae is None else self.vae.eval()),
            self.scheduler,
            prompts,
            range(len(prompts)),
            size_hw=(int(wanted[0]), int(wanted[1])),
            steps=self.config.steps if steps is None else steps,
            guidance=self.config.guidance if guidance is None else guidance,
            seed=seed,
        )
        return ImagePipelineOutput(images=[Image.fromarray(image) for image in images])
