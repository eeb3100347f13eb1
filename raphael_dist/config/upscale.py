"""Section `upscale`: super-resolution, which enlarges a small image guided by a caption."""

from raphael_dist.config.types import Free, NonNegative, NonNegativeFloat, Positive, Section, Shape
from raphael_dist.errors import UserError

COLOURS = 3


class Upscale(Section):
    """Super-resolution: the U-Net gets a small image as a second input, and generates a larger one."""

    factor: Shape[NonNegative] = 0
    """Super-resolution: the model enlarges a small image, which the U-Net gets as a second input, by this factor per side:
    2, 4, 8 or another power of two. 0: no super-resolution.
    """

    patch: Shape[Positive] = 1
    """Super-resolution: each latent position gets, as additional input channels, the patch x patch pixels of the small image
    at this place. Only one value is valid: max(1, F / upscale.factor), where F is the downsampling factor of the VAE (8 for
    Stable Diffusion, 1 without a VAE).
    """

    noise: NonNegativeFloat = 0.0
    """Super-resolution: training adds noise to the small image, whose values are from -1 to 1. The standard
    deviation of the noise is drawn for each image between 0 and this value. 0: no noise.
    """

    back_projections: Free[NonNegative] = 3
    """Super-resolution: number of corrections after sampling that bring the enlarged image closer to the small input image.
    Each correction scales the output down, subtracts it from the small image, enlarges the difference and adds it to the
    output. 0: no corrections.
    """

    @property
    def channels(self) -> int:
        """Number of input channels of the U-Net for the small image, next to the latents; 0 without super-resolution."""
        return COLOURS * self.patch**2 if self.factor else 0


def check_small_images(upscale: Upscale, latent_factor: int, buckets: tuple[tuple[int, int], ...]) -> None:
    """Check that `upscale.patch` fits the VAE, and that image sizes can be divided by `upscale.factor`.

    Args:
        upscale: the section `upscale`.
        latent_factor: image height divided by latent height (and width by width), such as 8.
        buckets: image sizes (height, width) in pixels.

    Raises:
        UserError: `upscale.patch` is not max(1, latent_factor / upscale.factor), or an image size is not a multiple of
            `upscale.factor`.
    """
    factor, patch = upscale.factor, max(1, latent_factor // upscale.factor) if upscale.factor else upscale.patch
    if upscale.patch != patch:
        raise UserError(
            f"upscale.patch={upscale.patch} must be {patch} if upscale.factor={factor} and the downsampling factor of the "
            f"VAE is {latent_factor}. Set upscale.patch={patch}."
        )
    for height, width in buckets:
        if factor and (height % factor or width % factor):
            raise UserError(
                f"image.buckets must have heights and widths that are multiples of upscale.factor={factor}, but [{height}, "
                f"{width}] is not. Use, for example, [{height // factor * factor or factor}, "
                f"{width // factor * factor or factor}]."
            )
