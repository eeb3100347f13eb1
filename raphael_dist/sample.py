"""Command line: `python -m raphael_dist.sample --checkpoint RUN_DIR --prompt "a red heart, noto style" --out grid.png`.

Under a launcher (`torchrun --nproc_per_node 8 -m raphael_dist.sample ...`) the prompts are divided over the ranks.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    from raphael_dist.cli.missing_packages import report_missing_packages

    report_missing_packages()

from raphael_dist.cli.common import Parser, add_sampling, check_range, check_seed
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import counted, print_line

if TYPE_CHECKING:
    import numpy as np

    from raphael_dist.runtime.ranks import Ranks
    from raphael_dist.sampling.distributed import SamplingSettings
    from raphael_dist.sampling.load_model import TrainedModel
    from raphael_dist.sampling.sampler import Request

STRENGTH = 0.8  # without --strength
GRID = 144  # images in a grid at most


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the sampling command. On a mistake, argparse ends the process with exit code 2."""
    parser = Parser(
        prog="raphael_dist.sample",
        example='python -m raphael_dist sample --checkpoint models/emoji --prompt "a red heart, noto style" --out grid.png',
        usage="%(prog)s --checkpoint PATH [options]",
        description="Sample images from a checkpoint.",
    )
    add_sampling(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("--prompt", action="append", default=[], help="caption of one image; may be repeated")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line, or .jsonl (docs/sampling.md)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt, for all prompts")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), metavar="FILE", help=f"grid of up to {GRID} images")
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image to DIR/NUMBER.png")
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="number of images of each prompt")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: sample.guidance of the run)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the initial noise (default: sample.seed of the run)")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="LoRA adapters: a peft folder, or a run that trained them")
    parser.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="S", help="strength of the adapters (default 1; 0: off)"
    )
    parser.add_argument(
        "--control", type=Path, metavar="IMAGE", help="image whose edges the sample follows; requires --control-from"
    )
    parser.add_argument("--control-from", type=Path, metavar="PATH", help="run that trained a ControlNet, or its export")
    kinds = ("hed", "canny", "map")
    parser.add_argument(
        "--control-kind", choices=kinds, default="hed", help="edge detector for --control; map: --control is an edge map"
    )
    parser.add_argument(
        "--control-scale", type=float, default=1.0, metavar="S", help="strength of the ControlNet (default 1; 0: off)"
    )
    parser.add_argument("--upscale", type=Path, metavar="IMAGE", help="small image to enlarge with a super-resolution model")
    parser.add_argument("--image", type=Path, metavar="IMAGE", help="image to start from instead of noise")
    parser.add_argument(
        "--strength", type=float, metavar="S", help=f"how much --image changes, from 0 to 1 (default {STRENGTH})"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sampling command; return the exit code. `argv`: the command-line arguments; None: those of this process."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Sample images on all ranks of a launcher (or in this process alone), and write them as a grid to `args.out`.

    `args`: the parsed arguments of the sampling command (`parse`). Raises UserError for mistakes that the user can correct.
    """
    _check(args)

    from raphael_dist.runtime.ranks import raise_on_all_ranks
    from raphael_dist.sampling.load_model import AdapterOptions, open_model

    adapters = AdapterOptions(args.lora, args.lora_scale, args.control_from, args.control_scale)
    with open_model(args.checkpoint, args.weights, adapters) as (trained, ranks):
        requests, settings = raise_on_all_ranks(lambda: _make_requests(args, trained))
        shown = _draw(args, trained, requests, settings, ranks)
        if ranks.is_main:
            print_line(f"{args.out}: {len(shown)} of {counted(len(requests), 'image')} from {trained.origin}")


def _check(args: argparse.Namespace) -> None:
    check_seed(args.seed)
    check_range("--batch", args.batch, 1)
    check_range("--per-prompt", args.per_prompt, 1)
    check_range("--guidance", args.guidance, 0)
    check_range("--strength", args.strength, 0, 1)
    check_range("--lora-scale", args.lora_scale, -math.inf)
    check_range("--control-scale", args.control_scale, -math.inf)
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out={args.out} must end in .png, .jpg or .webp. Use, for example, --out grid.png.")
    if args.prompt and args.prompts:
        raise UserError(f"--prompts={args.prompts} cannot be combined with --prompt. Use one of the two.")
    if args.lora_scale != 1 and args.lora is None:
        raise UserError(
            f"--lora-scale={args.lora_scale} requires --lora, but it is not given. Add --lora PATH with the adapters, or "
            "leave out --lora-scale."
        )
    if (args.control is None) != (args.control_from is None):
        present, missing, remedy = (
            ("--control", "--control-from", "--control-from PATH with the run that trained a ControlNet")
            if args.control
            else ("--control-from", "--control", "--control IMAGE with the image whose edges the sample follows")
        )
        raise UserError(f"{present} requires {missing}, but it is not given. Add {remedy}, or leave out {present}.")
    if args.strength is not None and args.image is None:
        raise UserError(
            f"--strength={args.strength} requires --image, but it is not given. Add --image FILE with the image to start "
            "from, or leave out --strength."
        )
    if args.control is None and (args.control_scale != 1 or args.control_kind != "hed"):
        raise UserError(
            "--control-scale and --control-kind require --control, but it is not given. Add --control IMAGE with the image "
            "whose edges the sample follows, or leave out --control-scale and --control-kind."
        )


def _make_requests(args: argparse.Namespace, trained: "TrainedModel") -> "tuple[list[Request], SamplingSettings]":
    """Return a request per image, and how to sample. Raises UserError for options that are incompatible with the model."""
    from raphael_dist.sampling.distributed import SamplingSettings
    from raphael_dist.sampling.prompts import check_sizes, read_edges, read_fitted_image, read_requests, read_small
    from raphael_dist.sampling.sampler import Request

    config, s = trained.config, trained.config.sample
    size = tuple(args.size) if args.size else config.image.buckets[0]
    default = Request("", size, s.seed if args.seed is None else args.seed, negative=args.negative)
    if args.prompts:
        requests = read_requests(args.prompts, default)
    else:
        requests = [replace(default, prompt=p, index=i) for i, p in enumerate(args.prompt or s.prompts)]
    if not requests:
        raise UserError(
            "--prompt or --prompts is required, because the run has no captions of its own (its sample.prompts is empty). "
            "Add, for example, --prompt 'a red heart, noto style'."
        )
    check_sizes(requests, trained.sampler.image.factor)
    if args.image:
        requests = [replace(r, start=read_fitted_image(args.image, r.size_hw)) for r in requests]
    if args.control:
        maps = {size: read_edges(args.control, size, args.control_kind) for size in {r.size_hw for r in requests}}
        requests = [replace(r, edges=maps[r.size_hw]) for r in requests]
    own = s.images and config.upscale.factor and not (args.upscale or args.prompt or args.prompts)
    paths, option = (s.images, "sample.images") if own else ([args.upscale] * len(requests), "--upscale")
    small = cache(lambda path, size: read_small(path, config.upscale, size, option))
    requests = [replace(r, small=small(path, r.size_hw)) for r, path in zip(requests, paths, strict=True)]
    requests = [replace(r, copy=copy) for r in requests for copy in range(args.per_prompt)]
    guidance = s.guidance if args.guidance is None else args.guidance
    steps = s.steps if args.steps is None else args.steps
    strength = STRENGTH if args.strength is None else args.strength
    check_range("--steps", steps, 1, config.diffusion.num_timesteps - 1)
    return requests, SamplingSettings(steps, guidance, args.batch, strength)


def _draw(
    args: argparse.Namespace,
    trained: "TrainedModel",
    requests: "list[Request]",
    settings: "SamplingSettings",
    ranks: "Ranks",
) -> "dict[int, np.ndarray]":
    """Draw this rank's share of the images; write a file per image if --images is set, and on rank 0 the grid. Collective.

    On rank 0, returns {number of the request: image, uint8 [H, W, 3]} with the images of the grid. Other ranks return {}.
    """
    from PIL import Image

    from raphael_dist.model.diffusion import make_scheduler
    from raphael_dist.runtime.long_work import long_work
    from raphael_dist.sampling.distributed import draw_share
    from raphael_dist.sampling.grid import caption_grid, save_image
    from raphael_dist.sampling.rank_group import gather_to_rank0

    config, name = trained.config, args.scheduler or trained.config.sample.scheduler
    grid_images: dict[int, np.ndarray] = {}
    with long_work("sampling") as report, _write_errors():
        for batch in draw_share(trained.sampler, requests, lambda: make_scheduler(config.diffusion, name), settings, ranks):
            for number, pixels in batch:
                if args.images:
                    save_image(Image.fromarray(pixels), args.images / f"{number:06d}.png")
                if number < GRID:
                    grid_images[number] = pixels
            report(f"image {batch[-1][0] + 1} of {len(requests)}", batch[-1][0] + 1, len(requests))
    images = gather_to_rank0(grid_images)
    if ranks.is_main:
        numbers = sorted(images)
        labels = [requests[n].label or requests[n].prompt for n in numbers]
        with _write_errors():
            save_image(caption_grid([images[n] for n in numbers], labels), args.out)
    return images


@contextmanager
def _write_errors() -> Iterator[None]:
    """Return a context manager that raises UserError if code in its `with` block raises OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out, --images: {error.filename} cannot be written: {error.strerror or error}. Choose another path."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
