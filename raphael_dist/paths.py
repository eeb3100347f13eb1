"""Command line: `python -m raphael_dist.paths --checkpoint RUN_DIR --prompt "a red heart, noto style" --out paths`.

Writes the diffusion paths of a trained model: figures of routes, regions and time experts, and a report.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael_dist.config import WEIGHTS
from raphael_dist.errors import UserError, exit_code_of

if TYPE_CHECKING:
    from raphael_dist.insight.classifier import Outcome
    from raphael_dist.sampling.load import Trained

CAPTIONS = 2000  # that are read at most
WORDS = ("captions", "adjectives", "verbs")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="raphael_dist.paths", description="Show the diffusion paths of a trained model.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run directory, step-* folder or exported pipeline")
    parser.add_argument("--prompt", action="append", default=[], help="caption to draw and to follow; give it several times")
    parser.add_argument("--out", type=Path, default=Path("paths"), help="folder for the figures, paths.json and report.md")
    parser.add_argument("--weights", choices=WEIGHTS, help="averaged weights, or the last ones (default: ema if there)")
    parser.add_argument("--timestep", type=int, default=300, help="regions are those of the step nearest to it")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the initial noise")
    parser.add_argument(
        "--classify",
        choices=WORDS,
        action="append",
        default=[],
        help="tell these words by their paths, by XGBoost",
    )
    parser.add_argument("--captions", nargs="+", metavar="SHARDS", help="shards to take captions from (default: the run's)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write everything below `args.out`. Raises UserError for what the user can fix."""
    import torch

    from raphael_dist.insight.report import Report
    from raphael_dist.sampling.load import load_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(args.checkpoint, args.weights, device)
    _check(args, trained)
    report = Report(trained.origin)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        _time(args.out, trained, report)
        # A model that enlarges small pictures draws nothing from a caption alone; its experts are looked at all the same.
        own = () if trained.config.upscale.factor else trained.config.sample.prompts[:3]
        for number, prompt in enumerate(args.prompt or own):
            _prompt(args, trained, number, prompt, report)
        _experts(args, trained, report)
        for kind in args.classify:
            report.outcomes[kind] = _classify(args, trained, kind)
        (args.out / "paths.json").write_text(json.dumps(report.routes, indent=1))
        (args.out / "report.md").write_text(report.text())
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot write {error.filename}: {error.strerror or error}") from None
    print(report.text() + f"\nfigures in {args.out}")


def _check(args: argparse.Namespace, trained: "Trained") -> None:
    m, last = trained.config.model, trained.config.diffusion.num_timesteps - 1
    if not (m.space_experts or m.time_experts):
        raise UserError(f"--checkpoint {args.checkpoint}: a dense model has no experts, and so no paths")
    if not 0 <= args.timestep <= last:
        raise UserError(f"--timestep: given {args.timestep}, allowed 0 to {last}")
    if args.steps is not None and not 1 <= args.steps <= last:
        raise UserError(f"--steps: given {args.steps}, allowed 1 to {last}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: given {args.seed}, allowed 0 to 2**63 - 1")
    if args.classify and not m.space_experts:
        raise UserError("--classify: the model has no space experts (model.space_experts=0)")


def _time(out: Path, trained: "Trained", report: Any) -> None:
    """Draw the bands of the time experts over all timesteps."""
    from raphael_dist.insight.figures import bands
    from raphael_dist.insight.routes import time_routes

    num = trained.config.diffusion.num_timesteps
    route_LT = time_routes(trained.model, num)
    if route_LT is not None:
        bands(route_LT.numpy(), range(num), "time expert of each block at each timestep (right: noise)").save(
            out / "time.png"
        )
        report.add_time(route_LT)


def _prompt(args: argparse.Namespace, trained: "Trained", number: int, prompt: str, report: Any) -> None:
    """Draw a prompt; show its words' routes, and their regions on the picture."""
    from raphael_dist.insight.coverage import agreement, coverage
    from raphael_dist.insight.figures import overlays, route_table
    from raphael_dist.insight.prompt import follow
    from raphael_dist.insight.routes import noisy_word_routes

    s = trained.config.sample
    steps = s.steps if args.steps is None else args.steps
    seen = follow(trained, prompt, steps=steps, guidance=s.guidance, seed=args.seed, timestep=args.timestep)
    seen.picture.save(args.out / f"prompt-{number}.png")
    if seen.route_WL is None:
        return
    title = f"space expert of each word in each block: {prompt}"
    route_table(seen.words, seen.route_WL, title).save(args.out / f"prompt-{number}-routes.png")
    title = f"regions of the words in each block at timestep {seen.timestep:.0f}: {prompt}"
    pixels, regions = seen.pixels, seen.regions
    overlays(pixels, seen.words, regions, seen.route_WL, title).save(args.out / f"prompt-{number}-regions.png")
    text, m = trained.sampler.text.encode([prompt]), trained.config.model
    noisy_LY = noisy_word_routes(trained.model, text.tokens, m.gate_noise)[0]
    mask_Y = text.mask[0].cpu()
    agree = agreement(seen.record, noisy_LY, mask_Y)
    report.add_prompt(prompt, seen, coverage(seen.record, noisy_LY, mask_Y, m.space_experts), agree)


def _experts(args: argparse.Namespace, trained: "Trained", report: Any) -> None:
    """Find dead and duplicate experts; draw how often each is chosen by the words of the captions."""
    import torch

    from raphael_dist.insight.experts import dead, duplicates, loads
    from raphael_dist.insight.figures import heat_map
    from raphael_dist.insight.routes import paths_of_words, time_routes

    m, findings = trained.config.model, []
    if m.space_experts:
        words = paths_of_words(trained.model, trained.sampler.text, _captions(args, trained))
        paths = torch.tensor([path for _, _, path in words])
        load_LK = loads(paths.T, m.space_experts)
        title = f"how often the words of the captions choose each space expert ({len(paths)} words; 1 is an even share)"
        heat_map(load_LK.numpy(), title).save(args.out / "space-experts.png")
        findings += dead("space", load_LK)
    route_LT = time_routes(trained.model, trained.config.diffusion.num_timesteps)
    if route_LT is not None:
        findings += dead("time", loads(route_LT, m.time_experts))
    report.findings = findings + duplicates(trained.model)


def _captions(args: argparse.Namespace, trained: "Trained") -> list[str]:
    from raphael_dist.data.plain import read_samples

    config, option = trained.config, "--captions" if args.captions else "data.shards"
    samples = read_samples(args.captions or config.data.shards, config.data.cache_dir, (8, 8), option, limit=CAPTIONS)
    return [sample.captions[0] for sample in samples]


def _classify(args: argparse.Namespace, trained: "Trained", kind: str) -> "Outcome":
    from raphael_dist.insight import vocabulary
    from raphael_dist.insight.classifier import classify, gather
    from raphael_dist.insight.routes import paths_of_words

    only: Sequence[str] = ()
    if kind == "captions":
        captions = _captions(args, trained)
    elif kind == "adjectives":
        captions, only = vocabulary.adjective_captions(), vocabulary.ADJECTIVES
    else:
        captions, only = vocabulary.verb_captions(), vocabulary.VERBS
    return classify(gather(paths_of_words(trained.model, trained.sampler.text, captions), only))


if __name__ == "__main__":
    sys.exit(main())
