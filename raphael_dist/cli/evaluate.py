"""Command line: `python -m raphael_dist evaluate images|text --checkpoint RUN_DIR --out FOLDER ...`.

`images` samples images at several guidance scales and compares them with real images and their captions (FID, KID,
precision, recall, CLIP score). `text` samples images of captions with quoted text, and reads the text by OCR. The ranks of a
launcher share the work. A command that was stopped continues when it is started again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raphael_dist.cli.common import Parser, add_sampling, check_range, check_seed, command
from raphael_dist.errors import UserError
from raphael_dist.text import counted, escape_control

if TYPE_CHECKING:
    from raphael_dist.evaluation.study import Study
    from raphael_dist.runtime.ranks import Ranks
    from raphael_dist.sampling.distributed import SamplingSettings
    from raphael_dist.sampling.load_model import TrainedModel
    from raphael_dist.sampling.sampler import Request

GUIDANCES = (1.5, 3.0, 4.5, 6.0, 7.5, 9.0)  # as in the paper's trade-off curve


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command `evaluate`. On a mistake, argparse ends the process with exit code 2."""
    data = "shards=data/emoji-demo/val-0000.tar"
    example = "python -m raphael_dist evaluate images --checkpoint models/emoji --out scores --features hed"
    example += f" --captions {data} --reference {data}"
    parser = Parser(prog="raphael_dist evaluate", example=example, description="Measure the images of a model.")
    studies = parser.add_subparsers(dest="study", required=True)
    usage = "%(prog)s --checkpoint PATH --out DIR --captions SOURCE [options]"
    images = studies.add_parser(
        "images", help="FID, KID, precision, recall and CLIP score for each guidance scale", example=example, usage=usage
    )
    add_common_arguments(images)
    images.add_argument(
        "--captions", required=True, metavar="SOURCE", help="coco=FILE, folder=DIR, shards=PATTERN, prompts=FILE"
    )
    images.add_argument("--reference", metavar="SOURCE", help="real images: folder=DIR or shards=PATTERN")
    images.add_argument(
        "--features", metavar="NET", help="hed, or inception=FILE (torch-fidelity's weights) for the usual FID"
    )
    images.add_argument("--clip", type=Path, metavar="DIR", help="folder of a transformers CLIP, for the CLIP score")
    images.add_argument(
        "--side", type=int, metavar="N", help="crop and resize all images to N x N pixels before comparing (COCO: 256)"
    )
    example = (
        "python -m raphael_dist evaluate text --checkpoint models/emoji --captions 'shards=data/emoji/val-*' --out lettering"
    )
    text = studies.add_parser("text", help="share of quoted text that an OCR engine reads", example=example, usage=usage)
    add_common_arguments(text)
    text.add_argument(
        "--captions",
        required=True,
        metavar="SOURCE",
        help='coco=..., folder=..., shards=... or prompts=...; captions contain text in "quotes", or name letter emoji',
    )
    text.add_argument("--reference", metavar="SOURCE", help="shards=PATTERN: real images, whose text is read for comparison")
    text.add_argument(
        "--ocr",
        default="rapidocr",
        metavar="NAME",
        help="rapidocr (PP-OCRv6, the default), tesseract, or MODULE:FUNCTION that turns an image's pixels into text",
    )
    text.add_argument(
        "--alphabet",
        metavar="CHARACTERS",
        help="the characters that rapidocr may read, with those of the captions (default: all capital letters if the "
        "captions have one, and likewise small letters and digits)",
    )
    return parser.parse_args(argv)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that the subcommands `images` and `text` share: model, output folder, and how images are sampled."""
    add_sampling(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="output folder for images, features and results"
    )
    parser.add_argument("--guidance", type=float, nargs="+", metavar="G", help="one or more guidance scales")
    parser.add_argument("--count", type=int, metavar="N", help="number of captions (FID-30k: 30000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise and of the choice of captions")


def run(args: argparse.Namespace) -> None:
    """Sample images from a trained model and measure their quality, on all ranks of a launcher.

    `args`: the parsed command line. Raises UserError for mistakes of the user.
    """
    check_arguments(args)

    from raphael_dist.sampling.load_model import open_model

    with open_model(args.checkpoint, args.weights) as (trained, ranks):
        _run(args, trained, ranks)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError if a number in the parsed command line `args` is out of range, or a required option is missing."""
    for option, least in (("count", 2), ("steps", 1), ("batch", 1), ("side", 1), ("per_pair", 1)):
        check_range(f"--{option.replace('_', '-')}", getattr(args, option, None), least)
    check_seed(args.seed)
    for scale in args.guidance or ():
        check_range("--guidance", scale, 0)
    if args.study == "images":
        if bool(args.reference) != bool(args.features):
            present, missing, remedy = (
                ("--reference", "--features", "--features hed")
                if args.reference
                else ("--features", "--reference", "--reference folder=DIR with the real images")
            )
            raise UserError(f"{present} requires {missing}, but it is not given. Add {remedy}, or leave out {present}.")
        if not (args.features or args.clip):
            raise UserError(
                "--features (to compare with real images) or --clip (for the CLIP score) is required, but neither is "
                "given. Add --features hed --reference SOURCE (the real images), or --clip DIR (a CLIP model)."
            )


def drawing_settings(args: argparse.Namespace, trained: "TrainedModel") -> "tuple[SamplingSettings, str, Request]":
    """Return how images are sampled: settings, name of the scheduler, and a `Request` with size and seed but no prompt.

    The caller copies this request for each image and sets the caption as the prompt. `args`: the parsed command line.
    Raises UserError if --steps or --size is incompatible with the model.
    """
    from raphael_dist.sampling.distributed import SamplingSettings
    from raphael_dist.sampling.prompts import check_sizes
    from raphael_dist.sampling.sampler import Request

    config, s = trained.config, trained.config.sample
    steps = s.steps if args.steps is None else args.steps
    check_range("--steps", steps, 1, config.diffusion.num_timesteps - 1)
    default = Request("", tuple(args.size) if args.size else config.image.buckets[0], args.seed)
    check_sizes([default], trained.sampler.image.factor)
    return SamplingSettings(steps, s.guidance, args.batch), args.scheduler or s.scheduler, default


def protocol_of(args: argparse.Namespace, trained: "TrainedModel", **study: object) -> dict[str, object]:
    """Return all settings that affect the results of an evaluation, as JSON values for the file protocol.json.

    A command that continues in a folder with other settings in protocol.json is refused, so that results of different
    settings are never mixed.

    `args`: the parsed command line. `trained`: the model. `study`: further settings to include, which depend on the
    subcommand (`images` or `text`).
    """
    from raphael_dist.storage.versions import versions

    settings, scheduler, default = drawing_settings(args, trained)
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
        **study,
    }


def _run(args: argparse.Namespace, trained: "TrainedModel", ranks: "Ranks") -> None:
    """Sample images of the captions at each guidance scale, and measure them."""
    from raphael_dist.evaluation.curve import draw_curve, require_matplotlib
    from raphael_dist.evaluation.draw import record_protocol
    from raphael_dist.evaluation.study import run_study
    from raphael_dist.evaluation.study_data import read_reference
    from raphael_dist.runtime.long_work import long_work, run_on_all_ranks
    from raphael_dist.runtime.ranks import raise_on_all_ranks

    settings, scheduler, default = raise_on_all_ranks(lambda: drawing_settings(args, trained))
    study = run_on_all_ranks(
        "reading captions and feature networks", lambda _: _make_study(args, trained, default, scheduler)
    )
    text = args.study == "text"
    guidances = tuple(args.guidance or ((settings.guidance,) if text else GUIDANCES))
    several = len(guidances) > 1

    with long_work("reading real images"):
        if several:
            require_matplotlib()
        if ranks.is_main:
            record_protocol(args.out, protocol_of(args, trained, **_describe_study(args, study)))
        size = (study.side, study.side) if study.side else default.size_hw
        cache = trained.config.data.cache_dir
        reference = read_reference(args.reference, cache, size) if not text and args.reference else []
    results = run_study(trained, study, settings, guidances, reference, ranks)
    if ranks.is_main:
        if several:
            draw_curve(results, args.out / "curve.png", f"{trained.origin}, {counted(len(study.requests), 'caption')}")
        print(escape_control((args.out / "results.csv").read_text(encoding="utf-8").strip(), keep="\n"))
        print(f"settings of these results: {args.out / 'protocol.json'}")


def _make_study(args: argparse.Namespace, trained: "TrainedModel", default: "Request", scheduler: str) -> "Study":
    from raphael_dist.evaluation.image_features import ClipScore, load_features
    from raphael_dist.evaluation.lettering import alphabet_of, normalise_text, requested_text
    from raphael_dist.evaluation.ocr import load_reader
    from raphael_dist.evaluation.study import Study
    from raphael_dist.evaluation.study_data import read_captions, read_lettering

    text = args.study == "text"
    requests = read_captions(args.captions, None if text else args.count, args.seed, default, trained.config.data.cache_dir)
    if text:
        requests = [request for request in requests if requested_text(request.prompt)][: args.count]
        if not requests:
            raise UserError(
                f"--captions {args.captions} must have captions with text in double quotes, but no caption has any. Add "
                'captions such as: a sign that says "hello".'
            )
        empty = [request.prompt for request in requests if not normalise_text(requested_text(request.prompt) or "")]
        if empty:
            raise UserError(
                f"--captions {args.captions}: text in double quotes must contain a letter or a digit, but in {len(empty)} "
                f"of {len(requests)} captions it has neither, for example in {empty[0]!r}. Remove these captions, or "
                "quote other text."
            )
        true = read_lettering(args.reference, trained.config.data.cache_dir, default.size_hw) if args.reference else []
        texts = [requested_text(request.prompt) or "" for request in requests] + [text for _, text in true]
        reader = load_reader(args.ocr, alphabet_of(texts, args.alphabet))
        return Study(args.out, requests, scheduler, reader=reader, true_texts=true)
    features = load_features(args.features, trained.device) if args.features else None
    clip = ClipScore(args.clip, trained.device) if args.clip else None
    return Study(args.out, requests, scheduler, features, clip, side=args.side)


def _describe_study(args: argparse.Namespace, study: "Study") -> dict[str, object]:
    """Return what protocol.json states about the images to sample: options, number of prompts and a hash of the prompts.

    `args`: the command line, with the options of the subcommand. `study`: the evaluation, with its prompts.
    """
    import hashlib

    prompts = hashlib.sha256(json.dumps([[r.prompt, r.seed, r.index] for r in study.requests]).encode()).hexdigest()[:16]
    names = ("captions", "reference", "features", "side", "ocr", "alphabet", "clip")
    options = {name: str(getattr(args, name)) for name in names if getattr(args, name, None) is not None}
    return {**options, "count": len(study.requests), "prompts_digest": prompts}


main = command(parse, run)
