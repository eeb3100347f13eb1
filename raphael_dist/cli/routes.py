"""Command line: `python -m raphael_dist routes --checkpoint RUN_DIR --prompt "a red heart, noto style" --out paths`.

Writes figures and a report about the experts of a trained model: which expert each word and each timestep is routed to (in
the paper: diffusion paths), and the image region that belongs to each word.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raphael_dist.cli.common import Parser, add_model, check_range, check_seed, command
from raphael_dist.errors import UserError
from raphael_dist.text import escape_control

if TYPE_CHECKING:
    from raphael_dist.analysis.route_report import RouteReport
    from raphael_dist.sampling.load_model import TrainedModel

CAPTIONS = 2000  # largest number of captions that are read


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command `routes`. On a mistake, argparse ends the process with exit code 2."""
    parser = Parser(
        prog="raphael_dist routes",
        example='python -m raphael_dist routes --checkpoint models/emoji --prompt "a red heart, noto style" --out paths',
        usage="%(prog)s --checkpoint PATH [options]",
        description="Show which experts a trained model uses for words and timesteps, in figures and a report.",
    )
    add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="caption to sample an image for and to show the routes of; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("paths"), metavar="DIR", help="folder of figures, paths.json, report.md"
    )
    parser.add_argument(
        "--timestep",
        type=int,
        default=300,
        metavar="T",
        help="timestep at which the image regions of words are shown (default 300)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the initial noise (default 0)")
    parser.add_argument(
        "--captions",
        nargs="+",
        metavar="SHARDS",
        help="shards to take captions from, or prompts=FILE (default: data.shards of the run)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write figures and a report about the experts of a trained model into the folder `args.out`.

    Raises UserError for mistakes of the user.
    """
    import torch

    from raphael_dist.analysis.route_report import RouteReport
    from raphael_dist.sampling.load_model import load_trained
    from raphael_dist.storage.files import replace_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(args.checkpoint, args.weights, device)
    _check(args, trained)
    report = RouteReport(trained.origin)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        _draw_time_routes(args.out, trained, report)
        _report_experts(args, trained, report)
        # A super-resolution model requires a small image: only its experts are examined.
        own = () if trained.config.upscale.factor else trained.config.sample.prompts[:3]
        for number, prompt in enumerate(args.prompt or own):
            _draw_prompt(args, trained, number, prompt, report)
        replace_bytes(args.out / "paths.json", json.dumps(report.routes, indent=1).encode(), durable=False)
        replace_bytes(args.out / "report.md", report.text().encode(), durable=False)
    except OSError as error:
        raise UserError(
            f"--out {args.out}: {error.filename} cannot be written: {error.strerror or error}. Choose another folder."
        ) from None
    print(escape_control(report.text(), keep="\n") + f"\nfigures in {args.out}")


def _check(args: argparse.Namespace, trained: "TrainedModel") -> None:
    m, last = trained.config.model, trained.config.diffusion.num_timesteps - 1
    if not (m.space_experts or m.time_experts):
        raise UserError(
            f"--checkpoint {args.checkpoint} must be a model with experts, but it is a dense model: without experts there "
            "are no routes to show. Use a checkpoint with model.space_experts or model.time_experts above 0."
        )
    check_range("--timestep", args.timestep, 0, last)
    check_range("--steps", args.steps, 1, last)
    check_seed(args.seed)


def _draw_time_routes(out: Path, trained: "TrainedModel", report: "RouteReport") -> None:
    """Draw which time expert each block uses at each timestep, as time.png in `out`; add this to `report`."""
    from raphael_dist.analysis.gate_routes import time_routes
    from raphael_dist.analysis.route_figures import draw_bands
    from raphael_dist.sampling.grid import save_image

    num = trained.config.diffusion.num_timesteps
    route_LT = time_routes(trained.model, num)
    if route_LT is not None:
        title = "time expert of each block at each timestep (right: noise)"
        save_image(draw_bands(route_LT.numpy(), range(num), title), out / "time.png")
        report.add_time(route_LT)


def _draw_prompt(args: argparse.Namespace, trained: "TrainedModel", number: int, prompt: str, report: "RouteReport") -> None:
    """Sample the image of a prompt; draw the experts of its words, and the words' regions in the image.

    The figures are written into `args.out`, under names with `number`, the number of the prompt. The experts and the sizes
    of the regions are added to `report`.
    """
    from PIL import Image

    from raphael_dist.analysis.coverage import measure_coverage, route_agreement
    from raphael_dist.analysis.gate_routes import noisy_word_routes
    from raphael_dist.analysis.route_figures import draw_overlays, draw_routes
    from raphael_dist.analysis.trace_prompt import trace_prompt
    from raphael_dist.sampling.grid import save_image

    s = trained.config.sample
    steps = s.steps if args.steps is None else args.steps
    seen = trace_prompt(trained, prompt, steps=steps, guidance=s.guidance, seed=args.seed, timestep=args.timestep)
    save_image(Image.fromarray(seen.pixels), args.out / f"prompt-{number}.png")
    if seen.route_WL is None:
        return
    title = f"space expert of each word in each block: {prompt}"
    save_image(draw_routes(seen.words, seen.route_WL, title), args.out / f"prompt-{number}-routes.png")
    title = f"regions of the words in each block at timestep {seen.timestep:.0f}: {prompt}"
    pixels, regions = seen.pixels, seen.regions
    overlays = draw_overlays(pixels, seen.words, regions, seen.route_WL, title)
    save_image(overlays, args.out / f"prompt-{number}-regions.png")
    text, m = trained.sampler.text.encode([prompt]), trained.config.model
    noisy_LY = noisy_word_routes(trained.model, text.tokens, m.gate_noise)[0]
    mask_Y = text.mask[0].cpu()
    agree = route_agreement(seen.record, noisy_LY, mask_Y)
    report.add_prompt(prompt, seen, measure_coverage(seen.record, noisy_LY, mask_Y, m.space_experts), agree)


def _report_experts(args: argparse.Namespace, trained: "TrainedModel", report: "RouteReport") -> None:
    """Add dead and duplicate experts to `report`; draw how often the words of captions choose each space expert.

    The captions come from `args.captions`, or from the training data of the model.
    """
    import torch

    from raphael_dist.analysis.expert_diagnostics import expert_loads, find_dead, find_duplicates
    from raphael_dist.analysis.gate_routes import collect_word_paths, time_routes
    from raphael_dist.analysis.route_figures import draw_heat_map
    from raphael_dist.sampling.grid import save_image

    m, findings = trained.config.model, []
    if m.space_experts:
        words = collect_word_paths(trained.model, trained.sampler.text, _read_captions(args, trained))
        paths = torch.tensor([path for _, _, path in words])
        load_LK = expert_loads(paths.T, m.space_experts)
        title = f"how often the words of the captions choose each space expert ({len(paths)} words; 1 is an even share)"
        save_image(draw_heat_map(load_LK.numpy(), title), args.out / "space-experts.png")
        findings += find_dead("space", load_LK)
    route_LT = time_routes(trained.model, trained.config.diffusion.num_timesteps)
    if route_LT is not None:
        findings += find_dead("time", expert_loads(route_LT, m.time_experts))
    report.findings = findings + find_duplicates(trained.model)


def _read_captions(args: argparse.Namespace, trained: "TrainedModel") -> list[str]:
    from raphael_dist.data.sequential_samples import read_samples
    from raphael_dist.sampling.prompts import read_requests
    from raphael_dist.sampling.sampler import Request

    if args.captions and args.captions[0].startswith("prompts="):
        path = Path(args.captions[0].removeprefix("prompts="))
        return [request.prompt for request in read_requests(path, Request("", (8, 8)))][:CAPTIONS]
    config, option = trained.config, "--captions" if args.captions else "data.shards"
    samples = read_samples(args.captions or config.data.shards, config.data.cache_dir, (8, 8), option, limit=CAPTIONS)
    return [sample.captions[0] for sample in samples]


main = command(parse, run)
