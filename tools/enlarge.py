"""How well a model enlarges held-out pictures, beside bicubic: `enlarge.py --checkpoint RUN --out rows.png`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.errors import UserError, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run of super-resolution, or its export")
    parser.add_argument("--shards", nargs="+", help="pictures to measure on (default: data.val_shards of the run)")
    parser.add_argument("--count", type=int, default=1000, help="pictures that are measured at most")
    parser.add_argument("--shown", type=int, default=6, help="pictures of --out, spread evenly")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path(".cache/raphael_dist"), help="where indices of shards are kept"
    )
    parser.add_argument("--out", type=Path, help="where rows of pictures go: small, bicubic, the model's, true")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure and tell. Raises UserError for what the user can fix."""
    if args.count < 1 or args.shown < 1:
        raise UserError(f"--count {args.count} and --shown {args.shown} must be at least 1")
    import torch

    from raphael_dist.data.plain import read_samples
    from raphael_dist.evaluation.enlarged import enlarge, errors, figure
    from raphael_dist.model.diffusion import make_scheduler
    from raphael_dist.sampling.load import load_trained

    trained = load_trained(args.checkpoint, None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = trained.config
    if not config.upscale.factor:
        raise UserError(f"--checkpoint {args.checkpoint}: its model draws from captions alone (upscale.factor = 0)")
    shards = args.shards or config.data.val_shards
    samples = list(read_samples(shards, args.cache_dir, config.image.buckets[0], "--shards", args.count))
    found = list(
        enlarge(
            trained.sampler,
            samples,
            lambda: make_scheduler(config.diffusion, config.sample.scheduler),
            steps=args.steps or config.sample.steps,
            guidance=config.sample.guidance,
        )
    )
    print(f"{len(found)} pictures, {trained.origin}")
    for way, (absolute, psnr) in errors(found).items():
        print(f"{way:<20} mean absolute error {absolute:6.3f}  PSNR {psnr:6.2f} dB")
    if args.out:
        figure(found[:: max(1, len(found) // args.shown)][: args.shown]).save(args.out, optimize=True)
        print(f"the pictures: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
