"""Super-resolution (RAPHAEL, Fig. 8): the U-Net sees a small picture, in more channels beside the noised latents.

So do SR3 (arXiv 2104.07636) and Stable Diffusion's x4 upscaler. All else of the model, its loss and its sampling is as ever.

Shape legend: B samples, C latent channels, h and w latent height and width; H and W of the picture, Hs and Ws of the small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def shrink(images_B3HW: Tensor, factor: int) -> Tensor:
    """Return small pictures, uint8 [B, 3, Hs, Ws]: the averages over `factor` x `factor` pixels of uint8 ones."""
    # Exact in float32 on any device, sums of integers divided by a power of two, so a cached one is the one made anew.
    return F.avg_pool2d(images_B3HW.float(), factor).round().to(torch.uint8)


def beside_latents(x_BChw: Tensor, small_B3HsWs: Tensor, patch: int) -> Tensor:
    """Return [B, C + 3 patch^2, h, w]: latents, and small pictures in -1..1 brought to their size.

    A small picture with `patch` x `patch` pixels to a latent gives each of these its own channels, so that none is lost; one
    with fewer pixels than latents has them repeated.
    """
    small_BChw = F.pixel_unshuffle(small_B3HsWs, patch)
    size_hw = (x_BChw.shape[-2], x_BChw.shape[-1])
    if small_BChw.shape[-2:] != size_hw:
        small_BChw = F.interpolate(small_BChw, size_hw, mode="nearest")
    return torch.cat([x_BChw, small_BChw.to(x_BChw.dtype)], dim=1)


def back_project(images_B3HW: Tensor, small_B3HsWs: Tensor, times: int) -> Tensor:
    """Return drawn pictures in -1..1 whose averages over squares come near the small ones' pixels (Irani and Peleg, 1991).

    Autoencoder and sampling lose some of the colours, which the small picture has. What is off is enlarged and added.
    """
    factor = images_B3HW.shape[-1] // small_B3HsWs.shape[-1]
    for _ in range(times):
        off = small_B3HsWs - F.avg_pool2d(images_B3HW, factor)
        more = F.interpolate(off, scale_factor=factor, mode="bicubic", align_corners=False)
        images_B3HW = (images_B3HW + more).clamp(-1, 1)
    return images_B3HW
