"""Compare a super-resolution model with bicubic interpolation: `enlarge.py --checkpoint RUN --out rows.png`.

Held-out images are reduced by the model's factor (upscale.factor) and enlarged again. Bicubic interpolation is the baseline,
with and without back-projection. Back-projection corrects an enlarged image so that it equals the small image when it is
reduced again. It is also applied to the model's images. The autoencoder's reconstruction of the original image is the upper
bound.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.data.sequential_samples import read_samples
from raphael_dist.data.shards.decode_sample import DecodedSample
from raphael_dist.errors import UserError, run_command
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.super_resolution import back_project, downscale
from raphael_dist.sampling.load_model import load_trained
from raphael_dist.sampling.sampler import Request, Sampler, to_pixels, to_tensor
from raphael_dist.text import counted

MODEL, BICUBIC, AUTOENCODER, TRUE = "this model", "bicubic", "autoencoder", "true"
CORRECTED, DRAWN = f"{BICUBIC}, corrected", f"{MODEL}, as drawn"
METHODS = (BICUBIC, CORRECTED, DRAWN, MODEL, AUTOENCODER)
_LABEL = 76  # pixels to the left of the rows


@dataclass(frozen=True, eq=False)
class Enlargement:
    """A small image and its enlargements.

    Attributes:
        small: the small image, uint8 [Hs, Ws, 3].
        large: the image enlarged by each of METHODS ("bicubic", "this model", ...), uint8 [H, W, 3], by method; under "true"
            the original image.
    """

    small: np.ndarray
    large: Mapping[str, np.ndarray]


def enlarge(
    sampler: Sampler,
    samples: Sequence[DecodedSample],
    new_scheduler: Callable[[], Any],
    *,
    steps: int,
    guidance: float,
    batch: int = 16,
) -> Iterator[Enlargement]:
    """Reduce held-out images by the model's upscale.factor; enlarge them again by bicubic interpolation and by the model.

    Yields both results with and without back-projection, the autoencoder's reconstruction, and the original image.

    Args:
        sampler: the super-resolution model. Its prompts are the first captions of the samples.
        samples: the images and captions.
        new_scheduler: creates a scheduler for sampling; called for each batch.
        steps: number of denoising steps.
        guidance: guidance scale.
        batch: number of images that are sampled at once.
    """
    passes = sampler.upscale.back_projections
    uncorrected = replace(sampler, upscale=sampler.upscale.model_copy(update={"back_projections": 0}))
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        images_B3HW = torch.from_numpy(np.stack([s.image for s in part]))
        true = images_B3HW.permute(0, 2, 3, 1).numpy()
        small = downscale(images_B3HW, sampler.upscale.factor).permute(0, 2, 3, 1).contiguous().numpy()
        size_hw = (true.shape[1], true.shape[2])
        requests = [Request(s.captions[0], size_hw, index=first + i, small=small[i]) for i, s in enumerate(part)]
        drawn = uncorrected.draw(requests, new_scheduler(), steps=steps, guidance=guidance)
        mean, _ = sampler.image.encode(to_tensor(true).to(sampler.device))
        bicubic = np.stack([_enlarge_bicubic(image, size_hw) for image in small])
        large = {
            BICUBIC: bicubic,
            CORRECTED: _correct(bicubic, small, passes),
            DRAWN: drawn,
            MODEL: _correct(drawn, small, passes),
            AUTOENCODER: to_pixels(sampler.image.decode(mean)),
            TRUE: true,
        }
        for i in range(len(part)):
            yield Enlargement(small[i], {method: images[i] for method, images in large.items()})


def _correct(large_BHW3: np.ndarray, small_BHsWs3: np.ndarray, passes: int) -> np.ndarray:
    return to_pixels(back_project(to_tensor(large_BHW3), to_tensor(small_BHsWs3), passes))


def _enlarge_bicubic(small: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(small).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC))


def measure_errors(enlargements: Sequence[Enlargement]) -> dict[str, tuple[float, float]]:
    """Compare the images of each method (METHODS) with the original images (under "true"). Pixel values are 0..255.

    Returns:
        For each method, (mean absolute error of a pixel value, mean PSNR in dB). Both are means over all images.
    """
    table = {}
    for method in METHODS:
        errors = [e.large[method].astype(np.float64) - e.large[TRUE] for e in enlargements]
        psnr = [10 * np.log10(255**2 / max(np.square(error).mean(), 1e-9)) for error in errors]
        table[method] = float(np.mean([np.abs(error).mean() for error in errors])), float(np.mean(psnr))
    return table


def draw_rows(enlargements: Sequence[Enlargement], scale: int = 2) -> Image.Image:
    """Return an image with one column for each of `enlargements`.

    From top to bottom, a column shows the small image, its enlargements by bicubic interpolation and by the model, and the
    original image.

    `scale`: factor by which all images are enlarged, so that their pixels can be seen.
    """
    height, width = enlargements[0].large[TRUE].shape[:2]
    cell_h, cell_w = height * scale + 4, width * scale + 4
    sheet = Image.new("RGB", (_LABEL + cell_w * len(enlargements), 4 * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("small", BICUBIC, MODEL, TRUE)):
        draw.text((4, row * cell_h + cell_h // 2 - 6), name, fill="black", font_size=12)
        for column, enlargement in enumerate(enlargements):
            image = Image.fromarray(enlargement.small if name == "small" else enlargement.large[name])
            image = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (_LABEL + column * cell_w, row * cell_h + 2))
    return sheet


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/enlarge.py --checkpoint runs/emoji-upscale --out rows.png  # after training that preset",
        description="Enlarge held-out images with a super-resolution model, and compare the result with bicubic "
        "interpolation.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="super-resolution run or exported pipeline")
    parser.add_argument("--shards", nargs="+", help="images to measure on (default: data.val_shards of the run)")
    parser.add_argument("--count", type=int, default=1000, help="measure at most this many images (default 1000)")
    parser.add_argument("--shown", type=int, default=6, help="number of images on the sheet (default 6)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/raphael_dist"), help="folder of the shards' index")
    parser.add_argument("--out", type=Path, help="write a sheet of images: small, bicubic, the model's, original")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Enlarge images, print errors and write the image of `draw_rows`. UserError: mistakes that the user can correct."""
    for option in ("count", "shown"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option}={getattr(args, option)} must be at least 1. Give a larger number.")
    trained = load_trained(args.checkpoint, None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = trained.config
    if not config.upscale.factor:
        raise UserError(
            f"--checkpoint={args.checkpoint} requires a super-resolution model, but upscale.factor is 0. "
            "Give a run that was trained with upscale.factor of 2 or more."
        )
    shards = args.shards or config.data.val_shards
    samples = list(read_samples(shards, args.cache_dir, config.image.buckets[0], "--shards", args.count))
    enlargements = list(
        enlarge(
            trained.sampler,
            samples,
            lambda: make_scheduler(config.diffusion, config.sample.scheduler),
            steps=args.steps or config.sample.steps,
            guidance=config.sample.guidance,
        )
    )
    print(f"{counted(len(enlargements), 'image')}, {trained.origin}")
    for method, (absolute, psnr) in measure_errors(enlargements).items():
        print(f"{method:<20} mean absolute error {absolute:6.3f}  PSNR {psnr:6.2f} dB")
    if args.out:
        every = max(1, len(enlargements) // args.shown)
        draw_rows(enlargements[::every][: args.shown]).save(args.out, optimize=True)
        print(f"images: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
