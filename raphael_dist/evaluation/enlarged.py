"""Super-resolution beside what needs no training: held-out pictures are made smaller, enlarged again, and compared.

Bicubic interpolation is what a model must beat, also with the correction that drawn pictures have (`back_project`); what the
autoencoder makes of the true pictures is the best that can be drawn before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from raphael_dist.data.dataset import DecodedSample
from raphael_dist.model.upscale import back_project, shrink
from raphael_dist.sampling.sampling import Request, Sampler, to_pixels, to_tensor

OURS, BICUBIC, AUTOENCODER, TRUE = "this model", "bicubic", "autoencoder", "true"
CORRECTED, DRAWN = f"{BICUBIC}, corrected", f"{OURS}, as drawn"
_LABEL = 76  # pixels to the left of the rows


@dataclass(frozen=True, eq=False)
class Enlarged:
    """A small picture, uint8 [Hs, Ws, 3], and by their names the large ones, uint8 [H, W, 3]."""

    small: np.ndarray
    large: Mapping[str, np.ndarray]


def enlarge(
    sampler: Sampler, samples: Sequence[DecodedSample], make_scheduler: Any, *, steps: int, guidance: float, batch: int = 16
) -> Iterator[Enlarged]:
    """Yield what becomes of samples that are made smaller by the model's factor, with their first captions."""
    times = sampler.upscale.back_projections
    as_drawn = replace(sampler, upscale=sampler.upscale.model_copy(update={"back_projections": 0}))
    for first in range(0, len(samples), batch):
        some = samples[first : first + batch]
        images_B3HW = torch.from_numpy(np.stack([s.image for s in some]))
        true = images_B3HW.permute(0, 2, 3, 1).numpy()
        small = shrink(images_B3HW, sampler.upscale.factor).permute(0, 2, 3, 1).contiguous().numpy()
        size_hw = (true.shape[1], true.shape[2])
        requests = [Request(s.captions[0], size_hw, index=first + i, small=small[i]) for i, s in enumerate(some)]
        drawn = as_drawn.draw(requests, make_scheduler(), steps=steps, guidance=guidance)
        mean, _ = sampler.image.encode(to_tensor(true).to(sampler.device))
        bicubic = np.stack([_bicubic(one, size_hw) for one in small])
        ways = {
            BICUBIC: bicubic,
            CORRECTED: _corrected(bicubic, small, times),
            DRAWN: drawn,
            OURS: _corrected(drawn, small, times),
            AUTOENCODER: to_pixels(sampler.image.decode(mean)),
            TRUE: true,
        }
        yield from (Enlarged(small[i], {way: large[i] for way, large in ways.items()}) for i in range(len(some)))


def _corrected(large_BHW3: np.ndarray, small_BHsWs3: np.ndarray, times: int) -> np.ndarray:
    return to_pixels(back_project(to_tensor(large_BHW3), to_tensor(small_BHsWs3), times))


def _bicubic(small: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(small).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC))


def errors(found: Sequence[Enlarged]) -> dict[str, tuple[float, float]]:
    """Return by way the mean absolute error in 0..255, and the mean over pictures of their PSNR in dB."""
    table = {}
    for way in (BICUBIC, CORRECTED, DRAWN, OURS, AUTOENCODER):
        off = [one.large[way].astype(np.float64) - one.large[TRUE] for one in found]
        psnr = [10 * np.log10(255**2 / max(np.square(o).mean(), 1e-9)) for o in off]
        table[way] = float(np.mean([np.abs(o).mean() for o in off])), float(np.mean(psnr))
    return table


def figure(found: Sequence[Enlarged], scale: int = 2) -> Image.Image:
    """Return a picture: a column for each, its small picture, bicubic, the model's, and the true one, enlarged by pixels."""
    height, width = found[0].large[TRUE].shape[:2]
    cell_h, cell_w = height * scale + 4, width * scale + 4
    sheet = Image.new("RGB", (_LABEL + cell_w * len(found), 4 * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("small", BICUBIC, OURS, TRUE)):
        draw.text((4, row * cell_h + cell_h // 2 - 6), name, fill="black", font_size=12)
        for column, one in enumerate(found):
            picture = Image.fromarray(one.small if name == "small" else one.large[name])
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (_LABEL + column * cell_w, row * cell_h + 2))
    return sheet
