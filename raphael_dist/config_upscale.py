"""The section `upscale`: super-resolution, a model that draws a picture from a small one and a caption."""

from typing import Annotated, Any

from pydantic import Field

from raphael_dist.config_data import Section
from raphael_dist.errors import UserError

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
COLOURS = 3


class Upscale(Section):
    factor: NonNegative = Field(
        0, description="the U-Net sees the picture made so many times smaller: 2, 4, 8, ...; 0: it sees the caption alone"
    )
    patch: Positive = Field(
        1, description="pixels of the small picture to a latent's side: the image encoder's factor / upscale.factor, or 1"
    )
    noise: NonNegativeFloat = Field(
        0.0, description="deviations of noise on it in training, drawn from 0 up to this; its colours reach from -1 to 1"
    )

    back_projections: NonNegative = Field(
        3, description="how often a drawn picture is corrected by what its averages are off the small one's pixels"
    )

    @property
    def channels(self) -> int:
        """How many channels the small picture has beside the latents."""
        return COLOURS * self.patch**2 if self.factor else 0

    def picture_hw(self, small_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the size of the picture that is drawn from a small one of this size."""
        return small_hw[0] * self.factor, small_hw[1] * self.factor


def check_upscale(config: Any) -> None:
    """Raise ValueError where `upscale` does not go with the rest of the configuration."""
    factor = config.upscale.factor
    if not factor:
        return
    if factor == 1 or factor & (factor - 1):
        raise ValueError(f"upscale.factor = {factor}; allowed: 0 (off), 2, 4, 8, 16 and so on")
    if config.control.enabled:
        raise ValueError(f"upscale.factor = {factor} needs control.enabled=false: one of them at a time")


def check_small_pictures(upscale: Upscale, latent_factor: int, buckets: tuple[tuple[int, int], ...]) -> None:
    """Raise UserError where small pictures do not fit the latents, of which one is `latent_factor` pixels wide."""
    factor, patch = upscale.factor, max(1, latent_factor // upscale.factor) if upscale.factor else upscale.patch
    if upscale.patch != patch:
        raise UserError(
            f"upscale.patch is {upscale.patch}, but small pictures have {patch} x {patch} pixels to a latent (upscale.factor"
            f" is {factor}, the image encoder's {latent_factor}); set upscale.patch={patch}"
        )
    for height, width in buckets:
        if factor and (height % factor or width % factor):
            raise UserError(f"image.buckets: [{height}, {width}] is not a multiple of {factor}, upscale.factor")
