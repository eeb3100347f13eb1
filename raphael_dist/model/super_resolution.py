"""Super-resolution (RAPHAEL, Fig. 8): the U-Net gets a small image in additional input channels.

SR3 (arXiv 2104.07636) and Stable Diffusion's x4 upscaler work in the same way. Model, loss and sampling are unchanged
otherwise.

Shape legend: B samples, C latent channels, h and w latent height and width, H and W of the image, Hs and Ws of the small
one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def downscale(images_B3HW: Tensor, factor: int) -> Tensor:
    """Reduce images, uint8 [B, 3, H, W], to uint8 [B, 3, H / factor, W / factor].

    Each new pixel is the mean over a square of `factor` x `factor` pixels, rounded.
    """
    # Sums of integers divided by a power of two are exact in float32 on any device, so a cached image equals a new one.
    return F.avg_pool2d(images_B3HW.float(), factor).round().to(torch.uint8)


def append_small_image(x_BChw: Tensor, small_B3HsWs: Tensor, patch: int) -> Tensor:
    """Append small images in -1..1 to latents [B, C, h, w] as channels; return [B, C + 3 patch^2, h, w].

    Each latent position gets `patch` x `patch` pixels of the small image, each pixel in its own three channels. If the small
    image has fewer than h `patch` x w `patch` pixels, neighbouring latent positions get the same pixels.
    """
    small_BChw = F.pixel_unshuffle(small_B3HsWs, patch)
    size_hw = (x_BChw.shape[-2], x_BChw.shape[-1])
    if small_BChw.shape[-2:] != size_hw:
        small_BChw = F.interpolate(small_BChw, size_hw, mode="nearest")
    return torch.cat([x_BChw, small_BChw.to(x_BChw.dtype)], dim=1)


def back_project(images_B3HW: Tensor, small_B3HsWs: Tensor, times: int) -> Tensor:
    """Correct sampled images so that their downscaled versions approach the small images (Irani and Peleg, 1991).

    The autoencoder and sampling change colours, while the small image has the right colours. Each correction upsamples the
    difference between the small image and the downscaled sampled image, and adds the result to the sampled image.

    Args:
        images_B3HW: sampled images in -1..1.
        small_B3HsWs: the small images that were enlarged, in -1..1.
        times: number of corrections.

    Returns:
        The corrected images [B, 3, H, W] in -1..1.
    """
    factor = images_B3HW.shape[-1] // small_B3HsWs.shape[-1]
    for _ in range(times):
        error_B3HsWs = small_B3HsWs - F.avg_pool2d(images_B3HW, factor)
        correction_B3HW = F.interpolate(error_B3HsWs, scale_factor=factor, mode="bicubic", align_corners=False)
        images_B3HW = (images_B3HW + correction_B3HW).clamp(-1, 1)
    return images_B3HW
