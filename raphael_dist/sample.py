"""Command line: `python -m raphael_dist.sample --checkpoint RUN_DIR --prompt "a red heart, noto style" --out grid.png`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raphael_dist.errors import UserError, exit_code_of


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="raphael_dist.sample", description="Sample images from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run directory, or one of its step-* folders")
    parser.add_argument("--prompt", action="append", default=[], help="caption of one image; give it several times")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="where the captioned grid goes")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument("--guidance", type=float, help="weight of the caption (default: sample.guidance of the run)")
    parser.add_argument("--seed", type=int, help="fixes the initial noise (default: sample.seed of the run)")
    parser.add_argument("--scheduler", choices=("ddim", "dpm++"), help="default: sample.scheduler of the run")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged weights, or the last ones")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size (default: the first bucket)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Sample and write the grid. Raises UserError for what the user can fix."""
    import torch

    from raphael_dist.checkpoint.reader import open_newest
    from raphael_dist.convert.load import load_unet
    from raphael_dist.data.open import load_encoders
    from raphael_dist.model.diffusion import make_scheduler
    from raphael_dist.sampling.sampling import caption_grid, generate, save_image

    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: given {args.seed}, allowed 0 to 2**63 - 1")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out: given {args.out}, must end in .png, .jpg or .webp")
    reader = open_newest(args.checkpoint)
    config = reader.config()
    s, device = config.sample, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = args.prompt or list(s.prompts)
    steps, guidance = s.steps if args.steps is None else args.steps, s.guidance if args.guidance is None else args.guidance
    size = tuple(args.size) if args.size else config.image.buckets[0]
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" and device.type == "cuda" else torch.float32
    text, image = load_encoders(config, device, dtype)
    _check(prompts, steps, guidance, size, image.factor, config.diffusion.num_timesteps)
    model = load_unet(reader, args.weights).to(device, dtype)
    images = generate(
        model,
        text,
        image,
        make_scheduler(config.diffusion, args.scheduler or s.scheduler),
        prompts,
        range(len(prompts)),
        size_hw=size,
        steps=steps,
        guidance=guidance,
        seed=s.seed if args.seed is None else args.seed,
    )
    save_image(caption_grid(images, prompts), args.out)
    print(f"{args.out}: {len(prompts)} images from step {reader.step} of {args.checkpoint}")


def _check(prompts: list[str], steps: int, guidance: float, size: tuple[int, ...], factor: int, timesteps: int) -> None:
    if not prompts:
        raise UserError(
            '--prompt: none given and sample.prompts of the run is empty; give --prompt "a red heart, noto style"'
        )
    if not 1 <= steps < timesteps:
        raise UserError(f"--steps: given {steps}, allowed 1 to {timesteps - 1}")
    if not 0 <= guidance < float("inf"):
        raise UserError(f"--guidance: given {guidance}, must be a number from 0")
    if any(side < factor or side % factor for side in size):
        raise UserError(f"--size: given {list(size)}, must be multiples of the image encoder's factor {factor}")


if __name__ == "__main__":
    sys.exit(main())
