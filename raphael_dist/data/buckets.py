"""Multi-scale training: images go to the bucket [h, w] whose shape is nearest (paper, appendix)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

_TIE = 1e-9


def nearest_buckets(widths: np.ndarray, heights: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return int64 [N]: for each image the number of the bucket with the nearest aspect ratio (in logarithms).

    Among buckets of equal ratio the one of nearest area. `widths`, `heights`: pixels [N]; a bucket is (height, width).
    """
    h_B, w_B = np.array(buckets, np.float64).reshape(-1, 2).T
    w_N1, h_N1 = widths.astype(np.float64)[:, None], heights.astype(np.float64)[:, None]
    shape_NB = np.abs(np.log(w_N1 / h_N1) - np.log(w_B / h_B))
    area_NB = np.abs(np.log(w_N1 * h_N1) - np.log(w_B * h_B))
    tied_NB = shape_NB <= shape_NB.min(axis=1, keepdims=True) + _TIE
    return np.where(tied_NB, area_NB, np.inf).argmin(axis=1)


def fit(image: Image.Image, size_hw: tuple[int, int], flip: bool, resample: Image.Resampling) -> Image.Image:
    """Scale `image` until it covers `size_hw` (height, width), cut out the centre, mirror it left to right if `flip`."""
    height, width = size_hw
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        left = (image.width - width / scale) / 2
        top = (image.height - height / scale) / 2
        # Rounding may leave the box a hair outside the image, which Pillow refuses.
        box = (
            max(left, 0.0),
            max(top, 0.0),
            min(image.width - left, image.width),
            min(image.height - top, image.height),
        )
        image = image.resize((width, height), resample, box=box)
    return ImageOps.mirror(image) if flip else image


def resize_and_crop(image: Image.Image, size_hw: tuple[int, int], flip: bool) -> np.ndarray:
    """Return uint8 [3, h, w]: the RGB `image` fitted to `size_hw` (Lanczos; untouched if it has that size)."""
    fitted = fit(image, size_hw, flip, Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(fitted, np.uint8).transpose(2, 0, 1))
