"""Command line: `python -m raphael_dist.evaluate images|text|emoji --checkpoint RUN_DIR --out FOLDER ...`.

`images` compares with true pictures and captions (FID, KID, precision and recall, CLIP score) over weights of the guidance;
`text` reads what was to be written; `emoji` is a benchmark that needs no download. Ranks of a launcher divide the work, and
a command that was ended goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raphael_dist.config import WEIGHTS, Scheduler
from raphael_dist.errors import UserError, exit_code_of

if TYPE_CHECKING:
    from raphael_dist.evaluation.study import Study
    from raphael_dist.sampling.load import Trained
    from raphael_dist.sampling.sampling import Request
    from raphael_dist.sampling.spread import Settings

GUIDANCES = (1.5, 3.0, 4.5, 6.0, 7.5, 9.0)  # of the paper's trade-off curve


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="raphael_dist.evaluate", description="Measure how good a model's pictures are.")
    studies = parser.add_subparsers(dest="study", required=True)
    images = _common(studies.add_parser("images", help="FID, KID, precision, recall, CLIP score over guidance"))
    images.add_argument("--captions", required=True, help="coco=FILE, folder=DIR, shards=PATTERN or prompts=FILE")
    images.add_argument("--reference", help="true pictures: folder=DIR or shards=PATTERN")
    images.add_argument("--features", help="hed, or inception=FILE (torch-fidelity's weights) for FID as it is defined")
    images.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP of transformers, for the CLIP score")
    images.add_argument("--side", type=int, help="compare squares of so many pixels (COCO: 256)")
    text = _common(studies.add_parser("text", help="what an OCR engine reads in pictures of quoted text"))
    text.add_argument("--captions", required=True, help='as for images; text stands in "quotes", or on emoji of letters')
    text.add_argument("--ocr", default="tesseract", help="tesseract, or module:function of a picture's pixels")
    emoji = _common(studies.add_parser("emoji", help="held-out emoji against the true ones, without any download"))
    emoji.add_argument("--shards", nargs="+", help="training pictures (default: data.shards of the run)")
    emoji.add_argument("--val-shards", nargs="+", help="held-out pictures (default: data.val_shards of the run)")
    emoji.add_argument("--per-pair", type=int, default=1, help="pictures of each held-out pair")
    return parser.parse_args(argv)


def _common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run directory, step-* folder or exported pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures, features and results; continued")
    parser.add_argument("--guidance", type=float, nargs="+", help="weights of the caption")
    parser.add_argument("--count", type=int, help="how many captions (FID-30k: 30000)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")
    parser.add_argument("--scheduler", choices=get_args(Scheduler), help="default: sample.scheduler of the run")
    parser.add_argument("--weights", choices=WEIGHTS, help="averaged weights, or the last ones (default: ema if there)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="size to draw (default: the first bucket)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the noise, and which captions are taken")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time on each rank")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Run a study on all ranks of a launcher. Raises UserError for what the user can fix."""
    _check(args)

    from raphael_dist.sampling.load import opened

    with opened(args.checkpoint, args.weights) as (trained, ranks):
        if args.study == "emoji":
            _emoji(args, trained, ranks)
        else:
            _images(args, trained, ranks)


def _check(args: argparse.Namespace) -> None:
    for option in ("count", "steps", "batch", "side", "per_pair"):
        value = getattr(args, option, None)
        if value is not None and value < (2 if option == "count" else 1):
            least = 2 if option == "count" else 1
            raise UserError(f"--{option.replace('_', '-')}: given {value}, must be {least} or more")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: given {args.seed}, allowed 0 to 2**63 - 1")
    for weight in args.guidance or ():
        if not 0 <= weight < float("inf"):
            raise UserError(f"--guidance: given {weight}, must be numbers from 0")
    if args.study == "images":
        if bool(args.reference) != bool(args.features):
            raise UserError("--reference, --features: give both, for distances to true pictures, or none of them")
        if not (args.features or args.clip):
            raise UserError("--features, --clip: none given; give what is to be measured")


def _settings(args: argparse.Namespace, trained: "Trained") -> "tuple[Settings, str, Request]":
    """Return how pictures are drawn, by which scheduler, and a request without a prompt."""
    from raphael_dist.sampling.prompts import check_sizes
    from raphael_dist.sampling.sampling import Request
    from raphael_dist.sampling.spread import Settings

    config, s = trained.config, trained.config.sample
    steps, last = s.steps if args.steps is None else args.steps, config.diffusion.num_timesteps - 1
    if steps > last:
        raise UserError(f"--steps: given {steps}, allowed 1 to {last}")
    default = Request("", tuple(args.size) if args.size else config.image.buckets[0], args.seed)
    check_sizes([default], trained.sampler.image.factor)
    return Settings(steps, s.guidance, args.batch), args.scheduler or s.scheduler, default


def _protocol(args: argparse.Namespace, trained: "Trained", **more: Any) -> dict[str, Any]:
    """Return what decides the numbers: it is written beside them, and a folder of others is refused."""
    from raphael_dist.storage.versions import versions

    settings, scheduler, default = _settings(args, trained)
    return {
        "study": args.study,
        "checkpoint": trained.origin,
        "weights": trained.weights,
        "weights_digest": trained.digest,
        "steps": settings.steps,
        "scheduler": scheduler,
        "size": list(default.size_hw),
        "seed": args.seed,
        "dtype": str(trained.sampler.dtype).removeprefix("torch."),
        "versions": {
            name: version for name, version in versions().items() if name in ("torch", "diffusers", "transformers")
        },
        **more,
    }


def _images(args: argparse.Namespace, trained: "Trained", ranks: Any) -> None:
    """Draw captions at each guidance; compare with true pictures and captions, or read what is written there."""
    from raphael_dist.evaluation.curve import draw_curve, require_matplotlib
    from raphael_dist.evaluation.drawn import claim
    from raphael_dist.evaluation.readers import read_reference
    from raphael_dist.evaluation.study import run_study
    from raphael_dist.parallel.long_work import together
    from raphael_dist.parallel.ranks import all_or_none

    settings, scheduler, default = all_or_none(lambda: _settings(args, trained))
    study = together("reading captions and networks", lambda _: _study(args, trained, default, scheduler))
    text = args.study == "text"
    guidances = tuple(args.guidance or ((settings.guidance,) if text else GUIDANCES))
    several = len(guidances) > 1

    def prepare(_: Any) -> Any:
        if several:
            require_matplotlib()
        if ranks.is_main:
            claim(args.out, _protocol(args, trained, **_described(args, study)))
        cache = trained.config.data.cache_dir
        size = (study.side, study.side) if study.side else default.size_hw
        return read_reference(args.reference, cache, size) if not text and args.reference else []

    reference = together("reading true pictures", prepare)
    results = run_study(trained, study, settings, guidances, reference, ranks)
    if ranks.is_main:
        if several:
            draw_curve(results, args.out / "curve.png", f"{trained.origin}, {len(study.requests)} captions")
        print((args.out / "results.csv").read_text().strip())
        print(f"how they were made: {args.out / 'protocol.json'}")


def _study(args: argparse.Namespace, trained: "Trained", default: "Request", scheduler: str) -> "Study":
    from raphael_dist.evaluation.features import ClipScore, features_of
    from raphael_dist.evaluation.lettering import asked_text, reader_of
    from raphael_dist.evaluation.readers import read_captions
    from raphael_dist.evaluation.study import Study

    text = args.study == "text"
    requests = read_captions(args.captions, None if text else args.count, args.seed, default, trained.config.data.cache_dir)
    if text:
        requests = [request for request in requests if asked_text(request.prompt)][: args.count]
        if not requests:
            raise UserError(f'--captions {args.captions}: none of them asks for a text in "quotes"')
        return Study(args.out, requests, scheduler, reader=reader_of(args.ocr))
    features = features_of(args.features, trained.device) if args.features else None
    clip = ClipScore(args.clip, trained.device) if args.clip else None
    return Study(args.out, requests, scheduler, features, clip, side=args.side)


def _described(args: argparse.Namespace, study: "Study") -> dict[str, Any]:
    """Return the part of the protocol that says what is compared."""
    import hashlib

    prompts = hashlib.sha256(json.dumps([[r.prompt, r.seed, r.index] for r in study.requests]).encode()).hexdigest()[:16]
    names = ("captions", "reference", "features", "side", "ocr")
    given = {name: str(getattr(args, name)) for name in names if getattr(args, name, None) is not None}
    clip = {"clip": str(args.clip)} if getattr(args, "clip", None) else {}
    return {**given, **clip, "count": len(study.requests), "prompts_digest": prompts}


def _emoji(args: argparse.Namespace, trained: "Trained", ranks: Any) -> None:
    from dataclasses import replace

    from raphael_dist.evaluation.benchmark import Benchmark, run_benchmark
    from raphael_dist.evaluation.drawn import claim
    from raphael_dist.parallel.ranks import all_or_none

    settings, scheduler, default = all_or_none(lambda: _settings(args, trained))
    data = trained.config.data
    shards, val_shards = args.shards or list(data.shards), args.val_shards or list(data.val_shards)
    if args.guidance and len(args.guidance) > 1:
        raise UserError("--guidance: the emoji benchmark takes one weight")
    guidance = args.guidance[0] if args.guidance else settings.guidance
    protocol = {"guidance": guidance, "shards": shards, "val_shards": val_shards, "per_pair": args.per_pair}
    all_or_none(lambda: claim(args.out, _protocol(args, trained, **protocol)) if ranks.is_main else None)
    at = replace(settings, guidance=guidance)
    table = run_benchmark(trained, Benchmark(shards, val_shards, default, at, scheduler, args.per_pair, args.out), ranks)
    if ranks.is_main:
        print(table)


if __name__ == "__main__":
    sys.exit(main())
