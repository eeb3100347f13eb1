"""Command line: `python -m raphael_dist.sample --checkpoint RUN_DIR --prompt "a red heart, noto style" --out grid.png`.

Under a launcher (`torchrun --nproc_per_node 8 -m raphael_dist.sample ...`) the ranks divide the prompts.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raphael_dist.config import WEIGHTS, Scheduler
from raphael_dist.errors import UserError, exit_code_of

if TYPE_CHECKING:
    import numpy as np

    from raphael_dist.parallel.ranks import Ranks
    from raphael_dist.sampling.load import Trained
    from raphael_dist.sampling.sampling import Request
    from raphael_dist.sampling.spread import Settings

GRID = 144  # pictures that a grid shows at most


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="raphael_dist.sample", description="Sample images from a checkpoint.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run directory, one of its step-* folders, or an exported pipeline"
    )
    parser.add_argument("--prompt", action="append", default=[], help="caption of one image; give it several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line, or .jsonl (docs/learning.md)")
    parser.add_argument("--negative", default="", help="caption of what to keep away from, for all prompts")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help=f"the captioned grid, of up to {GRID} pictures")
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image there, by its number")
    parser.add_argument("--per-prompt", type=int, default=1, help="images of each prompt")
    parser.add_argument("--batch", type=int, default=16, help="images drawn at a time on each rank; changes no image")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument("--guidance", type=float, help="weight of the caption (default: sample.guidance of the run)")
    parser.add_argument("--seed", type=int, help="fixes the initial noise (default: sample.seed of the run)")
    parser.add_argument("--scheduler", choices=get_args(Scheduler), help="default: sample.scheduler of the run")
    parser.add_argument("--weights", choices=WEIGHTS, help="averaged weights, or the last ones (default: ema if there)")
    parser.add_argument(
        "--lora", type=Path, metavar="PATH", help="adapters to add: peft's folder, or a run that trained them"
    )
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how much of them: 0 nothing, 1 as trained")
    parser.add_argument(
        "--control", type=Path, metavar="PICTURE", help="a picture whose edges are followed, by --control-from"
    )
    parser.add_argument("--control-from", type=Path, metavar="PATH", help="a run that trained a control, or its export")
    parser.add_argument("--control-kind", choices=("hed", "canny", "map"), default="hed", help="map: it shows edges itself")
    parser.add_argument("--control-scale", type=float, default=1.0, help="how much they are followed: 0 not at all")
    parser.add_argument("--upscale", type=Path, metavar="PICTURE", help="a small picture, for a model that enlarges them")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size (default: the first bucket)")
    parser.add_argument("--image", type=Path, help="a picture to begin from")
    parser.add_argument("--strength", type=float, default=0.8, help="share of the steps that draw --image anew")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Sample and write the grid, on all ranks of a launcher. Raises UserError for what the user can fix."""
    _check(args)

    from raphael_dist.parallel.ranks import all_or_none
    from raphael_dist.sampling.load import Beside, opened

    beside = Beside(args.lora, args.lora_scale, args.control_from, args.control_scale)
    with opened(args.checkpoint, args.weights, beside) as (trained, ranks):
        requests, settings = all_or_none(lambda: _plan(args, trained))
        shown = _draw(args, trained, requests, settings, ranks)
        if ranks.is_main:
            print(f"{args.out}: {len(shown)} of {len(requests)} images from {trained.origin}")


def _check(args: argparse.Namespace) -> None:
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: given {args.seed}, allowed 0 to 2**63 - 1")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out: given {args.out}, must end in .png, .jpg or .webp")
    if args.prompt and args.prompts:
        raise UserError("--prompt, --prompts: both given; give one of them")
    for option, value in (("--batch", args.batch), ("--per-prompt", args.per_prompt)):
        if value < 1:
            raise UserError(f"{option}: given {value}, must be 1 or more")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance: given {args.guidance}, must be a number from 0")
    if not math.isfinite(args.lora_scale) or (args.lora_scale != 1 and args.lora is None):
        raise UserError(f"--lora-scale: given {args.lora_scale}, must be a number, and go with --lora")
    if (args.control is None) != (args.control_from is None) or not math.isfinite(args.control_scale):
        raise UserError("--control, --control-from: the picture and the control go together, with a number --control-scale")
    if not 0 <= args.strength <= 1:
        raise UserError(f"--strength: given {args.strength}, allowed 0 to 1")


def _plan(args: argparse.Namespace, trained: "Trained") -> "tuple[list[Request], Settings]":
    """Return what to draw, and how. UserError for what does not fit the model."""
    from raphael_dist.sampling.prompts import check_sizes, read_edges, read_picture, read_requests, read_small
    from raphael_dist.sampling.sampling import Request
    from raphael_dist.sampling.spread import Settings

    config, s = trained.config, trained.config.sample
    size = tuple(args.size) if args.size else config.image.buckets[0]
    default = Request("", size, s.seed if args.seed is None else args.seed, negative=args.negative)
    if args.prompts:
        requests = read_requests(args.prompts, default)
    else:
        requests = [replace(default, prompt=p, index=i) for i, p in enumerate(args.prompt or s.prompts)]
    if not requests:
        raise UserError(
            '--prompt: none given and sample.prompts of the run is empty; give --prompt "a red heart, noto style"'
        )
    check_sizes(requests, trained.sampler.image.factor)
    if args.image:
        requests = [replace(r, start=read_picture(args.image, r.size_hw)) for r in requests]
    if args.control:
        maps = {size: read_edges(args.control, size, args.control_kind) for size in {r.size_hw for r in requests}}
        requests = [replace(r, edges=maps[r.size_hw]) for r in requests]
    own = s.pictures and config.upscale.factor and not (args.upscale or args.prompt or args.prompts)
    paths, option = (s.pictures, "sample.pictures") if own else ([args.upscale] * len(requests), "--upscale")
    small = cache(lambda path, size: read_small(path, config.upscale, size, option))
    requests = [replace(r, small=small(path, r.size_hw)) for r, path in zip(requests, paths, strict=True)]
    requests = [replace(r, copy=copy) for r in requests for copy in range(args.per_prompt)]
    guidance = s.guidance if args.guidance is None else args.guidance
    settings = Settings(s.steps if args.steps is None else args.steps, guidance, args.batch, args.strength)
    if not 1 <= settings.steps < config.diffusion.num_timesteps:
        raise UserError(f"--steps: given {settings.steps}, allowed 1 to {config.diffusion.num_timesteps - 1}")
    return requests, settings


def _draw(
    args: argparse.Namespace, trained: "Trained", requests: "list[Request]", settings: "Settings", ranks: "Ranks"
) -> "dict[int, np.ndarray]":
    """Draw this rank's share and write what was asked for; return the pictures of the grid, on rank 0. Collective."""
    from PIL import Image

    from raphael_dist.model.diffusion import make_scheduler
    from raphael_dist.parallel.long_work import Tell, together
    from raphael_dist.sampling.grid import caption_grid, save_image
    from raphael_dist.sampling.ranks import to_main
    from raphael_dist.sampling.spread import draw_share

    config, name = trained.config, args.scheduler or trained.config.sample.scheduler
    shown: dict[int, np.ndarray] = {}

    def work(tell: Tell) -> None:
        share = draw_share(trained.sampler, requests, lambda: make_scheduler(config.diffusion, name), settings, ranks)
        with _progress(len(requests[ranks.rank :: ranks.world_size]), ranks.is_main) as advance:
            for batch in share:
                for number, pixels in batch:
                    if args.images:
                        save_image(Image.fromarray(pixels), args.images / f"{number:06d}.png")
                    if number < GRID:
                        shown[number] = pixels
                advance(len(batch))
                tell(f"image {batch[-1][0]} of {len(requests)}")

    together("sampling", lambda tell: _writing(lambda: work(tell)))
    pictures = to_main(shown)
    if ranks.is_main:
        numbers = sorted(pictures)
        grid = caption_grid([pictures[n] for n in numbers], [requests[n].prompt for n in numbers])
        _writing(lambda: save_image(grid, args.out))
    return pictures


def _writing(work: Any) -> None:
    try:
        work()
    except OSError as error:
        raise UserError(f"--out, --images: cannot write {error.filename}: {error.strerror or error}") from None


@contextmanager
def _progress(total: int, active: bool) -> Iterator[Any]:
    """Yield a function that moves a bar on by so many images: on a terminal alone, and on one rank."""
    if not (active and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)


if __name__ == "__main__":
    sys.exit(main())
