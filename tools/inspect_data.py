"""Inspect training data: `inspect_data.py SHARDS --out sheet.png [section.key=value]`.

Prints the file types (members) and json fields of the samples, bad samples with reasons, similar images, statistics of
captions, and the number of samples of each image size after data.filters. Draws a sheet of images with their edge maps and
captions.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import print_line

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        example="python tools/inspect_data.py 'data/emoji-demo/train-*' --out sheet.png", description=__doc__, raw=True
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SHARDS | section.key=value",
        help="tar files, patterns, or a folder of tar files; settings as for training",
    )
    parser.add_argument("--out", type=Path, help="write a sheet of images to this PNG file (default: no sheet)")
    parser.add_argument(
        "--count", type=int, default=1000, help="number of samples to decode, evenly distributed (default 1000)"
    )
    parser.add_argument("--images", type=int, default=24, help="number of images on the sheet (default 24)")
    parser.add_argument("--config", default="emoji-tiny", help="preset or YAML file with image.buckets and caption settings")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Inspect training data and print the report. Raises UserError for mistakes that the user can correct."""
    config = load_config(args.config, [word for word in args.words if _OVERRIDE.match(word)])
    shards = [word for word in args.words if not _OVERRIDE.match(word)] or list(config.data.shards)
    if not shards:
        raise UserError("SHARDS is required. Give tar files, a pattern or a folder, e.g. 'data/emoji-demo/train-*'.")
    if args.count < 1 or args.images < 1:
        raise UserError(
            f"--count {args.count} and --images {args.images} must be at least 1. Use e.g. --count 1000 --images 24."
        )
    from raphael_dist.data.captions import CaptionChoice
    from raphael_dist.data.shards.build_index import build_index
    from raphael_dist.data.shards.decode_sample import ImageDataset
    from raphael_dist.data.shards.shard_names import expand_shards, name_option
    from raphael_dist.data.shards.view import columns_of, open_view
    from raphael_dist.data_prep.contact_sheet import contact_sheet
    from raphael_dist.data_prep.inputs import shards_in
    from raphael_dist.data_prep.inspect_data import inspect, report_lines, truncated_captions

    patterns = [name for shard in shards for name in (shards_in(Path(shard)) if Path(shard).is_dir() else [shard])]
    if not patterns:
        raise UserError(
            f"SHARDS={', '.join(shards)} must contain tar files, but there are none. Make them from images with "
            "`python -m raphael_dist prepare IMAGES --out SHARDS`."
        )
    choice = CaptionChoice(config.data.caption_from, tuple(sorted(config.data.caption_weights.items())))
    with TemporaryDirectory() as folder:
        with name_option("data.shards" if shards == list(config.data.shards) else "SHARDS"):
            index = build_index(expand_shards(patterns), Path(folder), columns=columns_of(config.data.filters))
        view = open_view(index, config.image.buckets, config.data.filters)
        dataset = ImageDataset(index, config.image.buckets, "auto", captions=choice)
        findings = inspect(dataset, args.count, args.images)
        for line in report_lines(findings, dataset, view):
            print_line(line)
        print_line(truncated_captions(findings.captions, config.text.encoder, config.text.max_tokens))
    if args.out is not None and findings.sheet:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(findings.sheet).save(args.out, "PNG")
        except OSError as error:
            raise UserError(
                f"--out {args.out} cannot be written: {error.strerror or error}. Choose another file."
            ) from error
        print_line(f"sheet: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
