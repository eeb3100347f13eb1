"""Multi-scale training: each image goes to the bucket (height, width) with the nearest aspect ratio (paper, appendix)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

_TIE = 1e-9


def nearest_buckets(widths: np.ndarray, heights: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return, for each image, the bucket (image size) whose aspect ratio is nearest to the image's.

    Ratios are compared by their logarithms. If several buckets have this ratio, the one with the nearest area is returned.

    Args:
        widths: Widths of the images in pixels, [N].
        heights: Heights of the images in pixels, [N].
        buckets: (height, width) of each bucket in pixels.

    Returns:
        Number of each image's bucket, an index into `buckets`, int64 [N].
    """
    h_B, w_B = np.array(buckets, np.float64).reshape(-1, 2).T
    w_N1, h_N1 = widths.astype(np.float64)[:, None], heights.astype(np.float64)[:, None]
    shape_NB = np.abs(np.log(w_N1 / h_N1) - np.log(w_B / h_B))
    area_NB = np.abs(np.log(w_N1 * h_N1) - np.log(w_B * h_B))
    tied_NB = shape_NB <= shape_NB.min(axis=1, keepdims=True) + _TIE
    return np.where(tied_NB, area_NB, np.inf).argmin(axis=1)


def factor_errors(buckets: Sequence[tuple[int, int]], factor: int) -> list[str]:
    """Return an error message for each bucket (image size) whose height or width is not a multiple of `factor`.

    The list is empty if all are multiples.

    Args:
        buckets: (height, width) of each bucket in pixels.
        factor: Image height divided by latent height (and width by width), such as 8.
    """
    return [
        f"image.buckets=[{height}, {width}] must be multiples of {factor}, the downsampling factor of the VAE. Use "
        f"[{height // factor * factor or factor}, {width // factor * factor or factor}]."
        for height, width in buckets
        if height % factor or width % factor
    ]


def fit(image: Image.Image, size_hw: tuple[int, int], flip: bool, resample: Image.Resampling) -> Image.Image:
    """Return `image`, resized until it covers `size_hw` without changing its aspect ratio, and cropped to its centre.

    Args:
        image: An image of any mode and size.
        size_hw: (height, width) of the result in pixels.
        flip: Mirror the result left to right.
        resample: Pillow's resampling filter.
    """
    height, width = size_hw
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        left = (image.width - width / scale) / 2
        top = (image.height - height / scale) / 2
        # Rounding may put the box slightly outside the image, which Pillow rejects.
        box = (max(left, 0.0), max(top, 0.0), min(image.width - left, image.width), min(image.height - top, image.height))
        image = image.resize((width, height), resample, box=box)
    return ImageOps.mirror(image) if flip else image


def resize_and_crop(image: Image.Image, size_hw: tuple[int, int], flip: bool) -> np.ndarray:
    """Resize the RGB `image` with Lanczos to cover `size_hw`, crop the centre, and return uint8 [3, h, w].

    Args:
        image: An RGB image. Its pixels are unchanged if it already has the size.
        size_hw: (height, width) of the result in pixels.
        flip: Mirror the result left to right.
    """
    fitted = fit(image, size_hw, flip, Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(fitted, np.uint8).transpose(2, 0, 1))
